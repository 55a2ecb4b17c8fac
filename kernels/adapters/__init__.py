"""Drop-ins for other trainers: functions and classes with the signatures that TRL, verl, OpenRLHF
and oat call, computed by `kernels.ops`.

    from kernels.adapters import trl          # TRL 1.16
    trl.selective_log_softmax(logits, index)

No adapter imports the package it serves unless a function needs it. An option that the ops do not
compute is refused in one sentence; none is approximated. Log-probs and entropies are float32
(float64 for float64 input) whatever the dtype of the logits, where some trainers round to bfloat16.
"""

from kernels.adapters import oat, openrlhf, trl, verl

__all__ = ["oat", "openrlhf", "trl", "verl"]
