"""What processor, memory, limits and software mean for training: facts in, findings out."""

from collections.abc import Iterator

from trainer.doctor.findings import Finding, absent
from trainer.doctor.host_facts import LimitFacts, MemoryFacts, ProcessorFacts, SoftwareFacts
from trainer.doctor.told_sizes import gib

_GIB = 1 << 30
_MIB = 1 << 20
# A checkpoint is copied to the host's memory and written beside the next steps: of the UNet and both text encoders,
# 3.385 billion weights in bf16 with moments of 8 bits are 13.5 GB.
_AMPLE_RAM, _LEAST_RAM = 16 * _GIB, 4 * _GIB
_NOTICED_SWAP = 256 * _MIB  # less is what the kernel has moved out of the way at leisure
_STALLED_WARN, _STALLED_FAIL = 1.0, 10.0  # percent of a minute
_SHM_PER_WORKER = 64 * _MIB  # as `host/disk_room.py` warns at a start
_FEW_FILES, _TOO_FEW_FILES = 1024, 256  # 1024 is what most systems give and a run goes with; readers hold shards open


def judge_software(software: SoftwareFacts) -> list[Finding]:
    """PyTorch is there; whether it goes with the driver, `judge_driver` says."""
    if software.torch is None:
        advice = "install it as the README says"
        return [Finding("software", "PyTorch", "fail", "not installed", "everything computes with it", advice)]
    built = f"for CUDA {software.torch_cuda}" if software.torch_cuda else "without CUDA"
    told = f"{software.torch}, built {built}; Linux {software.kernel}"
    return [Finding("software", "PyTorch", "ok", told, "what computes")]


def judge_processor(processor: ProcessorFacts, workers: int, *, cards: int) -> list[Finding]:
    """Cores, caches and NUMA nodes, against the workers that are to run on them."""
    return [_load(processor), _cores(processor, workers), _caches(processor, workers, cards), _nodes(processor, cards)]


def _load(processor: ProcessorFacts) -> Finding:
    return Finding(
        "processor",
        "load",
        "warn" if processor.is_busy else "ok",
        f"{processor.load:.1f} processes want to run, on {processor.threads} threads",
        "what is measured is what they leave",
        "measure again when nothing else runs: speeds below are judged with a warning at most"
        if processor.is_busy
        else "",
        processor.load,
        "processes",
    )


def _cores(processor: ProcessorFacts, workers: int) -> Finding:
    cores, few = processor.cores or processor.threads, workers > (processor.cores or processor.threads)
    sockets = f", {processor.sockets} sockets" if processor.sockets > 1 else ""
    virtual = ", a virtual machine" if processor.is_virtual else ""
    told = f"{processor.model or 'unknown'}: {cores} cores, {processor.threads} threads{sockets}{virtual}"
    return Finding(
        "processor",
        "cores",
        "warn" if few else "ok",
        told,
        f"{workers} workers share them, each with its readers",
        "fewer workers than cores: workers that wait for a core keep all others waiting" if few else "",
        cores,
        "cores",
    )


def _caches(processor: ProcessorFacts, workers: int, cards: int) -> Finding:
    domains = processor.domains
    if not domains:
        return absent("processor", "L3 caches", "the kernel does not tell which cores share one")
    sizes = sorted({len(domain.cores) for domain in domains})
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    told = f"{len(domains)} of {each} cores"
    shared = cards > 1 and 1 < len(domains) < workers
    return Finding(
        "processor",
        "L3 caches",
        "warn" if shared else "ok",
        told,
        "a worker stays on cores that share one (launch.cores)",
        "some workers share a cache; nothing to set, but a processor with more of them would suit" if shared else "",
        len(domains),
        "caches",
    )


def _nodes(processor: ProcessorFacts, cards: int) -> Finding:
    """NVIDIA's nccl-tests, issue 74, and nccl, 841 and 1285: an EPYC as one node exchanges slowly through RAM."""
    per_socket = processor.nodes / processor.sockets
    told = f"{processor.nodes} node{'s' * (processor.nodes > 1)}"
    why = "cards exchange through the nearest node's memory"
    if "EPYC" not in processor.model or processor.is_virtual:
        return Finding("processor", "NUMA", "ok", told, why, value=processor.nodes, unit="nodes")
    told = f"{told}, NPS{per_socket:g}" if per_socket >= 1 else told
    if cards < 2 or per_socket > 1:
        return Finding("processor", "NUMA", "ok", told, why, value=per_socket, unit="nodes a socket")
    advice = (
        "BIOS: NUMA nodes per socket NPS4 (NPS2 where there is no 4), or L3 as NUMA; one at a time, judged by "
        "`sdxl-train doctor`'s all-reduce lines"
    )
    return Finding("processor", "NUMA", "warn", told, why, advice, per_socket, "nodes a socket")


def judge_memory(memory: MemoryFacts, workers: int, *, cards: int) -> list[Finding]:
    """RAM, swap and shared memory."""
    return [*_ram(memory, cards), _swap(memory), _shm(memory, workers, cards)]


def _ram(memory: MemoryFacts, cards: int) -> Iterator[Finding]:
    if memory.total is None or memory.available is None:
        yield absent("memory", "RAM", "the kernel does not tell")
        return
    free = memory.available
    level = "fail" if free < _LEAST_RAM else "warn" if cards and free < _AMPLE_RAM else "ok"
    advice = "end what holds it (`ps aux --sort=-rss | head`), or add some; `host.jsonl` of a run has its use by minute"
    yield Finding(
        "memory",
        "RAM",
        level,
        f"{gib(free)} available of {gib(memory.total)}",
        "checkpoints are copied there to be written",
        "" if level == "ok" else advice,
        free / _GIB,
        "GiB",
    )


def _swap(memory: MemoryFacts) -> Finding:
    stalled = memory.stalled_percent or 0.0
    level = "ok"
    if stalled >= _STALLED_FAIL:
        level = "fail"
    elif stalled >= _STALLED_WARN or memory.swap_used >= _NOTICED_SWAP:
        level = "warn"
    waited = f"; all waited for it {stalled:.1f} % of a minute" if memory.stalled_percent is not None else ""
    advice = "find who holds the memory (`smem -rs swap`), end it, then `swapoff -a && swapon -a`; readers need no swap"
    return Finding(
        "memory",
        "swap",
        level,
        f"{gib(memory.swap_used)} in use of {gib(memory.swap_total)}{waited}",
        "who waits for a swapped page keeps all cards waiting",
        "" if level == "ok" else advice,
        memory.swap_used / _GIB,
        "GiB",
    )


def _shm(memory: MemoryFacts, workers: int, cards: int) -> Finding:
    if memory.shm_free is None or memory.shm_total is None:
        return absent("memory", "/dev/shm", "there is none")
    needed = workers * _SHM_PER_WORKER
    small = memory.shm_free < needed
    level = "ok" if not small else "fail" if cards > 1 else "warn"
    return Finding(
        "memory",
        "/dev/shm",
        level,
        f"{gib(memory.shm_free)} free of {gib(memory.shm_total)}",
        f"cards exchange through it: {gib(needed)} for {workers} workers",
        "mount -o remount,size=2G /dev/shm; in a container: docker run --shm-size=2g" if small else "",
        memory.shm_free / _MIB,
        "MiB",
    )


def judge_limits(limits: LimitFacts) -> list[Finding]:
    """Open files and locked memory."""
    files = limits.open_files
    level = "ok"
    if files is not None and files < _FEW_FILES:
        level = "fail" if files < _TOO_FEW_FILES else "warn"
    locked = limits.locked_bytes
    short = limits.has_rdma and locked is not None
    return [
        Finding(
            "memory",
            "open files",
            level,
            "no limit" if files is None else f"{files:,}",
            "readers hold shards open, workers their sockets",
            "" if level == "ok" else "ulimit -n 65536, or LimitNOFILE= in the unit of systemd",
            files,
            "files",
        ),
        Finding(
            "memory",
            "locked memory",
            "warn" if short else "ok",
            "no limit" if locked is None else f"at most {gib(locked)}",
            "InfiniBand and RoCE lock their buffers",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit of systemd" if short else "",
            None if locked is None else locked / _MIB,
            "MiB",
        ),
    ]
