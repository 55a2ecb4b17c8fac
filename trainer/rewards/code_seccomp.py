"""A seccomp filter for the sandbox: system calls no graded program needs are refused.

bubblewrap's namespaces already keep a program in; the filter takes away the parts of the kernel
that namespaces do not cover (keyrings, io_uring, bpf, perf events, vsock and other socket
families) and the ways to make new ones. Refused calls fail with EPERM, they do not kill.
"""

from __future__ import annotations

import platform
import struct

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL_PROCESS, _EPERM = 0x7FFF0000, 0x80000000, 0x00050000 | 1
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_X32_BIT = 0x40000000
_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: all closed by the network namespace

# Numbers of Linux's own headers: asm/unistd_64.h and asm-generic/unistd.h.
_REFUSED_EVERYWHERE = (
    *(425, 426, 427),  # io_uring_setup, io_uring_enter, io_uring_register
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree .. fspick, mount_setattr
    438,  # pidfd_getfd
)
_REFUSED = {
    "x86_64": (
        *(101, 310, 311),  # ptrace, process_vm_readv, process_vm_writev
        *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
        *(248, 249, 250),  # add_key, request_key, keyctl
        *(298, 321, 323),  # perf_event_open, bpf, userfaultfd
        *(175, 176, 246, 313),  # init_module, delete_module, kexec_load, finit_module
        *(303, 304),  # name_to_handle_at, open_by_handle_at
    ),
    "aarch64": (
        *(117, 270, 271),
        *(41, 51, 40, 39, 97, 268),
        *(217, 218, 219),
        *(241, 280, 282),
        *(105, 106, 104, 273),
        *(264, 265),
    ),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET = {"x86_64": 41, "aarch64": 198}


def seccomp_filter() -> bytes | None:
    """The filter as an array of `struct sock_filter`, or None on a machine it is not written for.

    Source: Linux, Documentation/userspace-api/seccomp_filter.rst.
    """
    machine = platform.machine()
    if machine not in _REFUSED:
        return None
    refused = (*_REFUSED[machine], *_REFUSED_EVERYWHERE)
    # Jumps count instructions after their own, and the filter ends: allow, refuse, kill.
    body: list[tuple[int, int, str, str]] = [
        (_LOAD, _ARCH_OFFSET, "", ""),
        (_JUMP_EQUAL, _AUDIT_ARCH[machine], "", "kill"),
        (_LOAD, _NUMBER_OFFSET, "", ""),
        (_JUMP_AT_LEAST, _X32_BIT, "refuse", ""),
    ]
    body += [(_JUMP_EQUAL, number, "refuse", "") for number in refused]
    body += [(_JUMP_EQUAL, _SOCKET[machine], "", "allow"), (_LOAD, _FIRST_ARGUMENT_OFFSET, "", "")]
    body += [(_JUMP_EQUAL, family, "allow", "") for family in _SOCKET_FAMILIES[:-1]]
    body += [(_JUMP_EQUAL, _SOCKET_FAMILIES[-1], "allow", "refuse")]
    ends = {"allow": len(body), "refuse": len(body) + 1, "kill": len(body) + 2}
    packed = b""
    for at, (code, operand, if_true, if_false) in enumerate(body):
        jumps = [ends[name] - at - 1 if name else 0 for name in (if_true, if_false)]
        packed += struct.pack("=HBBI", code, *jumps, operand)
    for verdict in (_ALLOW, _EPERM, _KILL_PROCESS):
        packed += struct.pack("=HBBI", _RETURN, 0, 0, verdict)
    return packed
