"""A model's sizes as the records of pat-bench hold them, under the names that these records have had from the start."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from pat_serve.shapes.sizes import ModelSizes


class SizesRecord(BaseModel):
    """The sizes in a record; `ModelSizes` says what each one means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_head: bool
    linear_bytes: float | None = None

    @staticmethod
    def of(sizes: ModelSizes) -> SizesRecord:
        """The record of a model's sizes."""
        return SizesRecord(
            hidden_size=sizes.hidden,
            num_layers=sizes.layers,
            num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            ffn_size=sizes.ffn,
            vocab_size=sizes.vocab,
            tied_head=sizes.tied,
            linear_bytes=sizes.linear_bytes,
        )

    def sizes(self) -> ModelSizes:
        """The sizes that are recorded."""
        return ModelSizes(
            hidden=self.hidden_size,
            layers=self.num_layers,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            ffn=self.ffn_size,
            vocab=self.vocab_size,
            tied=self.tied_head,
            linear_bytes=self.linear_bytes,
        )


def _read(value: Any) -> Any:
    return SizesRecord.model_validate(value).sizes() if isinstance(value, dict) else value


# A field of a record.
RecordedSizes = Annotated[ModelSizes, BeforeValidator(_read), PlainSerializer(SizesRecord.of, return_type=SizesRecord)]
