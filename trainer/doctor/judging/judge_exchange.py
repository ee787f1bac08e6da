"""What the speeds of memory and of exchanges mean for training: facts in, findings out."""

from trainer.doctor.bus_facts import Link
from trainer.doctor.card_facts import CardsFacts
from trainer.doctor.exchange import MIB, SIZES, STALL, ExchangeFacts, SizeFacts
from trainer.doctor.findings import Finding, Level, absent
from trainer.doctor.host_facts import ProcessorFacts
from trainer.doctor.memory_speed import MemorySpeed
from trainer.doctor.told_sizes import seconds, speed

# A ring of four cards moves 7.7 GB through host memory for the bf16 gradients of the UNet, each byte written and read
# at least once: 15.4 GB for each card, 61.6 GB for four, which takes 3 s at 20 GB/s, and hides behind no pass.
_SLOW_MEMORY, _TOO_SLOW_MEMORY = 20e9, 5e9
# Of what the slowest link carries in one direction. Host-routed cards on PCIe 4.0 x16 (31.5 GB/s) were published at 19
# to 21 GB/s in both directions together, nccl-tests issue 74: a third in each.
_LOW_SHARE, _TOO_LOW_SHARE = 0.2, 0.05
_LOW_COPY, _TOO_LOW_COPY = 0.5, 0.2  # one card alone gets four fifths and more of its link
_STALLED_SHARE = 0.02
_UNSTEADY = 5.0  # p99 over median: the mean step is then slowed down by what the table's medians do not show
_UNET_BYTES = 2 * 2_567_463_684  # its gradients in bf16
_JUDGED = 16 * MIB  # the smallest size whose speed is judged: below, latency counts, and buckets are larger


def judge_memory_speed(speed_facts: MemorySpeed | None, processor: ProcessorFacts, *, cards: int) -> list[Finding]:
    """How fast memory is copied."""
    name = "memory speed"
    if speed_facts is None:
        return [absent("exchange", name, "not measured")]
    total = speed_facts.all_threads
    level: Level = "fail" if total < _TOO_SLOW_MEMORY else "warn" if total < _SLOW_MEMORY and cards > 1 else "ok"
    told = f"{speed(total)} by {speed_facts.threads} threads, {speed(speed_facts.one_thread)} by one"
    advice = "a module in each channel of the board, at the speed that both take (`sudo dmidecode -t 17`)"
    why = "what cards exchange, and what readers hand over, crosses it"
    return [Finding("exchange", name, level, told, why, "" if level == "ok" else advice, total / 1e9, "GB/s")]


def judge_exchange(exchange: ExchangeFacts | None, cards: CardsFacts) -> list[Finding]:
    """How workers add up."""
    if exchange is None:
        return [absent("exchange", "all-reduce", "not measured")]
    if exchange.error:
        advice = "the same as a run would meet: `dmesg`, NCCL_DEBUG=INFO, fewer cards by CUDA_VISIBLE_DEVICES"
        return [Finding("exchange", "all-reduce", "fail", exchange.error, "workers train only together", advice)]
    link = slowest_link(cards) if exchange.backend == "nccl" else None
    found = [*_copies(exchange, link)]
    if not exchange.sizes:
        return [*found, absent("exchange", "all-reduce", "one worker exchanges nothing")]
    left_out = SIZES[len(exchange.sizes) :]
    why = "left out: it would have taken too long, as on a machine that is busy"
    return [
        *found,
        *(_size(each, link) for each in exchange.sizes),
        *(absent("exchange", f"all-reduce {size // MIB} MiB", why) for size in left_out),
    ]


def slowest_link(cards: CardsFacts) -> Link | None:
    """The least that the cards' links can, for a ring is as fast as its slowest hop."""
    links = [possible for card in cards.cards if (possible := card.possible)]
    return min(links, key=lambda link: link.gigabytes_per_s, default=None)


def _copies(exchange: ExchangeFacts, link: Link | None) -> list[Finding]:
    """Host to card and back."""
    if not exchange.to_card:
        return []
    slower = min(exchange.to_card, exchange.from_card)
    share = slower / 1e9 / link.gigabytes_per_s if link else 1.0
    level: Level = "fail" if share < _TOO_LOW_COPY else "warn" if share < _LOW_COPY else "ok"
    of = f", {share:.0%} of {link}" if link else ""
    told = f"{speed(exchange.to_card)} to the slowest card, {speed(exchange.from_card)} back, all at once{of}"
    advice = "see the cards' PCIe lines; a slot behind a chipset shares its lanes with disks and network"
    why = "what an exchange through host memory cannot exceed"
    return [Finding("exchange", "copies", level, told, why, "" if level == "ok" else advice, slower / 1e9, "GB/s")]


def _size(each: SizeFacts, link: Link | None) -> Finding:
    median, slowest = each.bus_bytes_per_s, each.slow_bus_bytes_per_s
    share = median / 1e9 / link.gigabytes_per_s if link else None
    level: Level = "ok"
    if each.size >= _JUDGED and share is not None and share < _LOW_SHARE:
        level = "fail" if share < _TOO_LOW_SHARE else "warn"
    unsteady = each.stalls > _STALLED_SHARE * each.times and each.slowest_s > _UNSTEADY * each.median_s
    if unsteady and each.size >= _JUDGED and level == "ok":
        level = "warn"
    of = f" ({share:.0%} of {link})" if share is not None else ""
    told = (
        f"p50 {seconds(each.median_s)} = {speed(median)}{of}, p99 {seconds(each.slowest_s)} = {speed(slowest)}, "
        f"{each.stalls} of {each.times} stalled"
    )
    ring = 2 * (each.workers - 1) / each.workers * _UNET_BYTES / median
    why = f"the UNet's gradients would take {seconds(ring)}" if link else "between processes; cards do it another way"
    advice = "see the lines on IOMMU, NUMA, PCIe and memory speed, one change at a time"
    if unsteady:
        advice = f"{STALL:g} times the median and more: other work on these cores? launch.cores; BIOS: C-states off"
    name = f"{each.size // MIB} MiB"
    return Finding(
        "exchange", f"all-reduce {name}", level, told, why, "" if level == "ok" else advice, median / 1e9, "GB/s"
    )
