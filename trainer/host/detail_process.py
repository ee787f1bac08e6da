"""The child's side of `card_details`: a line about the driver, then one for each card as it answers."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.host.card_details import CardDetail, Holder, detail_line
from trainer.host.card_process import FAKE_CARDS, slowdowns, text_of

_PROC = Path("/proc")


def print_details(first: int) -> None:
    """Print what `read_card_details` reads, of the cards from number `first` on."""
    fake = os.environ.get(FAKE_CARDS)
    try:
        if fake:
            _print_fake(json.loads(Path(fake).read_text()), first)
        else:
            _print_driver(first)
    except Exception as error:  # no driver, no library: whatever it is, nothing can be read
        print(json.dumps({"why": str(error)}), flush=True)


def _print_fake(record: Mapping[str, Any], first: int) -> None:
    """Of the file that tests write: `details`, and `hangs` of a card that does not answer."""
    details = [dict(each) for each in record.get("details", [])]
    names = [_label(number, each.get("name", ""), each["uuid"]) for number, each in enumerate(details)]
    head = {"driver": record.get("driver", ""), "cuda": record.get("cuda"), "cards": names, "missing": 0}
    print(json.dumps(head), flush=True)
    for number, each in [*enumerate(details)][first:]:
        if each.pop("hangs", False):
            time.sleep(3600)
        print(json.dumps({**each, "number": number}), flush=True)


def _print_driver(first: int) -> None:
    import pynvml as nvml

    nvml.nvmlInit()
    count, handles = nvml.nvmlDeviceGetCount(), []
    for index in range(count):
        handle = _told(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:  # one that is gone has none
            uuid, name = text_of(nvml.nvmlDeviceGetUUID(handle)), text_of(nvml.nvmlDeviceGetName(handle))
            handles.append((index, uuid, name, handle))
    version = _told(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    head = {
        "driver": text_of(nvml.nvmlSystemGetDriverVersion()),
        "cuda": None if version is None else (version // 1000, version % 1000 // 10),
        "cards": [_label(index, name, uuid) for index, uuid, name, _ in handles],
        "missing": count - len(handles),
    }
    print(json.dumps(head), flush=True)
    for index, uuid, name, handle in handles[first:]:
        peers = {other: _peer(nvml, handle, h) for _, other, _, h in handles if other != uuid}
        print(detail_line(replace(_detail(nvml, uuid, name, handle, peers), number=index)), flush=True)


def _detail(nvml: Any, uuid: str, name: str, handle: Any, peers: Mapping[str, str]) -> CardDetail:
    """Everything of one card."""
    bus = _told(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    place = "" if bus is None else text_of(bus.busId)
    if _is_lost(nvml, handle):
        return CardDetail(uuid, name, place, lost=True)
    memory = _told(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    limit = _told(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    default = _told(nvml, nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    ecc = _told(nvml, nvml.nvmlDeviceGetEccMode, handle)
    errors = [
        _told(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, kind, nvml.NVML_AGGREGATE_ECC)
        for kind in (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)
    ]
    capability = _told(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return CardDetail(
        uuid,
        name,
        place,
        capability=None if capability is None else (capability[0], capability[1]),
        memory_total=None if memory is None else int(memory.total),
        memory_free=None if memory is None else int(memory.free),
        holders=tuple(_holders(nvml, handle)),
        power_limit_w=None if limit is None else limit / 1000,
        default_limit_w=None if default is None else default / 1000,
        clock_mhz=_told(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        max_clock_mhz=_told(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        ecc=None if ecc is None else bool(ecc[0]),
        uncorrected=errors[0],
        corrected=errors[1],
        generation=_told(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        width=_told(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        max_generation=_told(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        max_width=_told(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        replays=_told(nvml, nvml.nvmlDeviceGetPcieReplayCounter, handle),
        slowed_by=slowdowns(nvml, handle),
        peers=peers,
    )


def _is_lost(nvml: Any, handle: Any) -> bool:
    """Asked of the card itself: what the driver has kept in mind it tells of a lost one too."""
    try:
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    except nvml.NVMLError as error:
        return error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_NOT_FOUND)
    return False


def _holders(nvml: Any, handle: Any) -> list[Holder]:
    found: dict[int, int | None] = {}
    # The functions without a version refuse a library of another version than the binding's.
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v3):
        for each in _told(nvml, ask, handle) or ():
            found[each.pid] = each.usedGpuMemory
    return [Holder(pid, _command(pid), used) for pid, used in found.items()]


def _command(pid: int) -> str:
    """Its short name; "" of one in another container."""
    try:
        return (_PROC / str(pid) / "comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _peer(nvml: Any, one: Any, other: Any) -> str:
    status = _told(nvml, nvml.nvmlDeviceGetP2PStatus, one, other, 0)  # NVML_P2P_CAPS_INDEX_READ, a tuple in the binding
    words = {
        nvml.NVML_P2P_STATUS_OK: "ok",
        nvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED: "the chipset does not support it",
        nvml.NVML_P2P_STATUS_GPU_NOT_SUPPORTED: "the cards do not support it",
        nvml.NVML_P2P_STATUS_IOH_TOPOLOGY_NOT_SUPPORTED: "their slots are too far apart",
        nvml.NVML_P2P_STATUS_DISABLED_BY_REGKEY: "it is switched off in the driver",
        nvml.NVML_P2P_STATUS_NOT_SUPPORTED: "the driver does not support it",
    }
    return "unknown" if status is None else words.get(status, "unknown")


def _label(number: int, name: str, uuid: str) -> str:
    return f"card {number} ({name}, {uuid[:12]})"


def _told(nvml: Any, ask: Any, *arguments: Any) -> Any:
    """None where this card or driver does not tell."""
    try:
        return ask(*arguments)
    except nvml.NVMLError:
        return None
