"""The section `shard`: how images are written into tar shards, per role."""

from typing import Annotated

from pydantic import Field

from stages.runtime.params_file import Count, Section, Seed


class Shard(Section):
    """`shard.pretrain` or `shard.finetune`."""

    resize: Annotated[int, Field(ge=8, le=4096)]
    """Shorter side in pixels; smaller images keep their size."""
    quality: Annotated[int, Field(ge=1, le=100)] = 90
    images_per_shard: Count = 1000
    seed: Seed = 1
    """Seed of the global shuffle at writing."""


class Shards(Section):
    """The whole section: one sub-section per role, and where the work is done."""

    cluster: Annotated[str, Field(pattern=r"^(tcp|tls)://\S+:\d+$")] | None = None
    """A Dask scheduler, `tcp://host:8786`; null: the cores of this machine. Never changes bytes."""
    pretrain: Shard
    finetune: Shard
