"""The mean of all workers' rows, in as many bytes as a ring takes, and added up in fp32.

A ring would round at every hop. Here each worker gets the same share of rows from all others, adds them up in fp32 in
the order of the workers, and rounds their mean once; all get the means of all shares. So all have the same bits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.wire.row_codecs import Draws, RowCodec, chunks

# Its name from PyTorch 2.13 on, or the one before, of which that warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def mean_of_share(
    rows: Tensor, codec: RowCodec, own: Draws | None, mean: Draws | None, *, keeps_errors: bool
) -> Tensor:
    """The encoded mean of this worker's share of all workers' rows, uint8 [n / workers, row_bytes].

    Args:
        rows: fp32 [n, block], n a multiple of the workers. With `keeps_errors` what is left of them are the errors:
            what rounding has left out of these rows, and of the mean that this worker has made.
        own, mean: what is drawn to round this worker's rows, and the means of all rows; None: the nearest.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    share = len(rows) // world
    sent = _encoded(rows, codec, own, keeps_errors=keeps_errors)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    del sent
    total = torch.zeros(share, codec.block, device=rows.device)
    for part in received.view(world, share, codec.row_bytes):
        for begin, end in chunks(share, codec.block):
            total[begin:end] += codec.decode(part[begin:end])
    del received
    total /= world
    place = slice(rank * share, (rank + 1) * share)
    encoded = _encoded(total, codec, mean and mean.of(place.start, place.stop), keeps_errors=keeps_errors)
    if keeps_errors:
        rows[place].add_(total, alpha=world)  # of a mean, one worker's numbers are one part in `world`
    return encoded


def put_means(encoded: Tensor, rows: Tensor, codec: RowCodec) -> None:
    """Exchange the means of all shares, and put them into `rows`, fp32 [n, block]."""
    whole = torch.empty(len(rows), codec.row_bytes, dtype=torch.uint8, device=rows.device)
    _all_gather(whole, encoded)
    for begin, end in chunks(*rows.shape):
        rows[begin:end] = codec.decode(whole[begin:end])


def _encoded(rows: Tensor, codec: RowCodec, draws: Draws | None, *, keeps_errors: bool) -> Tensor:
    """Rows as they travel; with `keeps_errors`, the rows become what rounding has left out."""
    encoded = torch.empty(len(rows), codec.row_bytes, dtype=torch.uint8, device=rows.device)
    for begin, end in chunks(len(rows), codec.block):
        part = rows[begin:end]
        encoded[begin:end] = codec.encode(part, draws and draws.of(begin, end))
        if keeps_errors:
            part -= codec.decode(encoded[begin:end])
    return encoded
