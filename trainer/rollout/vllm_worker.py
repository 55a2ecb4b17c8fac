"""What a vLLM server needs to take weights from a trainer: methods for its workers, called by
`/collective_rpc` (`--worker-extension-cls trainer.rollout.vllm_worker.WeightReceiver`)."""

import datetime
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from trainer.rollout.transfer_group import TransferGroup, local_address


class WeightReceiver:
    """Becomes a base class of vLLM's worker, whose attributes it uses."""

    if TYPE_CHECKING:
        device: torch.device
        rank: int
        model_runner: Any
        vllm_config: Any

        def reload_weights(self, **options: object) -> None:
            """The worker's own."""

    def meet_trainer(self, host: str, port: int, size: int, timeout_seconds: float) -> None:
        """Joins the group of the trainer whose store is there; one joined before is left.

        Args:
            size: ranks of the group: the trainer's main rank and the workers of this server.
        """
        self.leave_trainer()
        parallel = self.vllm_config.parallel_config
        store = dist.TCPStore(
            host,
            port,
            is_master=False,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        self.transfer_group = TransferGroup.join(
            store,
            rank=1 + parallel.data_parallel_index * parallel.world_size + self.rank,
            size=size,
            address=local_address(host, port),
            device=self.device,
            timeout_seconds=timeout_seconds,
        )

    def leave_trainer(self) -> None:
        """Leaves the group, if there is one."""
        group: TransferGroup | None = self.__dict__.pop("transfer_group", None)
        if group is not None:
            group.abort()

    def take_weights(self) -> None:
        """Loads the weights that the trainer sends.

        Raises:
            RuntimeError: they broke off; the model is then part old, part new, and takes weights
                again.
        """
        try:
            self.reload_weights(weights_iterator=self.transfer_group.receive(self.device))
        except BaseException:
            # The layers that wait for their weights would count those of the next time to these.
            with set_current_vllm_config(self.vllm_config):
                model = self.model_runner.get_model()
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            self.leave_trainer()
            raise
