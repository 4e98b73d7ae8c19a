"""The size of an initial student, in parts of its teacher's encoder."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secondcast.storage_schemas.errors import SettingsError

if TYPE_CHECKING:
    from secondcast.models.student.student_network import StudentConfig

# What a student keeps of its teacher's configuration.
_KEPT = (
    *("vocab_size", "d_kv", "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
    *("feed_forward_proj", "pad_token_id", "eos_token_id"),
)
_NOUNS = {"units": "feed-forward units"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers of layers, heads and feed-forward units of a T5 encoder, and its width."""

    layers: int
    heads: int
    width: int
    units: int

    @classmethod
    def of_teacher(cls, config: dict[str, Any]) -> "Size":
        """The size of an encoder by its configuration."""
        return cls(
            layers=config["num_layers"], heads=config["num_heads"], width=config["d_model"], units=config["d_ff"]
        )

    @classmethod
    def of_student(cls, config: dict[str, Any], teacher: dict[str, Any]) -> "Size":
        """The size of a student's configuration, with as many of the teacher's whole heads as its heads are wide."""
        own = cls.of_teacher(config)
        heads = max(1, own.heads * config["d_kv"] // teacher["d_kv"])
        return cls(layers=own.layers, heads=heads, width=own.width, units=own.units)

    @classmethod
    def in_proportion(cls, layers: int, width: int, teacher: dict[str, Any]) -> "Size":
        """Numbers of heads and feed-forward units that have the same ratio to the width as the teacher's."""
        share = width / teacher["d_model"]
        heads, units = round(teacher["num_heads"] * share), round(teacher["d_ff"] * share)
        return cls(layers=layers, heads=max(1, heads), width=width, units=max(1, units))

    def check_within(self, teacher: "Size") -> None:
        """Raise SettingsError for a size that exceeds the teacher's in any number."""
        for name in ("layers", "heads", "width", "units"):
            own, most = getattr(self, name), getattr(teacher, name)
            if not 1 <= own <= most:
                asked = f"a width of {own}" if name == "width" else f"{own} {_NOUNS.get(name, name)}"
                raise SettingsError(
                    f"--size asks for {asked}, expected from 1 to {most}, the teacher's: an initial student is a part "
                    f"of its teacher's encoder; give a smaller --size"
                )

    def t5_config(self, teacher: dict[str, Any]) -> dict[str, Any]:
        """The configuration of a T5 of this size whose heads have the width of the teacher's."""
        return {key: teacher[key] for key in _KEPT if key in teacher} | {
            "d_model": self.width,
            "d_ff": self.units,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "dropout_rate": 0.0,
            "is_encoder_decoder": False,
            "use_cache": False,
        }

    def student_config(
        self, teacher: dict[str, Any], *, text_length: int, projection_rank: int | None
    ) -> "StudentConfig":
        """The configuration of a student of this size."""
        # It imports torch, which a plan does not need.
        from secondcast.models.student.student_network import StudentConfig

        return StudentConfig(
            **self.t5_config(teacher),
            project_in_dim=self.width,
            project_out_dim=teacher["d_model"],
            projection_dropout=0.0,
            text_length=text_length,
            projection_rank=projection_rank,
        )
