"""The dimensions of the draft that a configuration asks for. Importing it loads no torch."""

from dataclasses import replace

from eagle_rpc.config import Config
from eagle_rpc.config.choices import DraftRope
from eagle_rpc.sizes.draft import Eagle3DraftConfig
from eagle_rpc.sizes.target import TargetShape


def planned_draft(config: Config, shape: TargetShape) -> Eagle3DraftConfig:
    """The draft of this configuration, for a target of this shape.

    Raises `ConfigError` for missing sizes.
    """
    form, named = config.draft, config.target.aux_layer_ids
    base = Eagle3DraftConfig.from_target(
        shape,
        draft_vocab_size=draft_vocab_size(config, shape),
        intermediate_size=form.intermediate_size,
        num_attention_heads=form.num_attention_heads,
        num_key_value_heads=form.num_key_value_heads,
        plain_rope=form.rope is DraftRope.plain,
        max_length=config.target.max_length,
    )
    return replace(
        base,
        num_layers=form.num_layers,
        sliding_window=form.sliding_window,
        num_aux_layers=base.num_aux_layers if named is None else len(named),
        norm_before_residual=form.norm_before_residual,
        norm_before_fc=form.norm_before_fc,
        fc_norm=form.fc_norm,
        norm_output=form.norm_output,
    )


def draft_vocab_size(config: Config, shape: TargetShape) -> int:
    """`draft.vocab_size`; null: the whole vocabulary of the target."""
    return config.draft.vocab_size or shape.vocab_size
