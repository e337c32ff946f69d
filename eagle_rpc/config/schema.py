"""The typed configuration. Hydra composes it from `conf/` and overrides; other rooms never see OmegaConf.

A setting's rule stands in its type; unit and meaning stand below it. `docs/generate.py` makes a page of them.
"""

from dataclasses import dataclass, field

from eagle_rpc.config.sections.data import DataConfig, PromptsConfig, RegenerateConfig, SourceConfig
from eagle_rpc.config.sections.draft import DraftConfig, ServingConfig, TrainConfig
from eagle_rpc.config.sections.figures import (
    CompareConfig,
    EvaluateConfig,
    InspectConfig,
    ReportConfig,
    ServeCheckConfig,
)
from eagle_rpc.config.sections.target import SupervisionConfig, TargetConfig, VLLMConfig
from eagle_rpc.config.sections.workers import JobConfig, RpcConfig, RunConfig, TopologyConfig

__all__ = [
    "CompareConfig",
    "Config",
    "DataConfig",
    "DraftConfig",
    "EvaluateConfig",
    "InspectConfig",
    "JobConfig",
    "PromptsConfig",
    "RegenerateConfig",
    "ReportConfig",
    "RpcConfig",
    "RunConfig",
    "ServeCheckConfig",
    "ServingConfig",
    "SourceConfig",
    "SupervisionConfig",
    "TargetConfig",
    "TopologyConfig",
    "TrainConfig",
    "VLLMConfig",
]


@dataclass(kw_only=True, slots=True)
class Config:
    """All settings of a job."""

    job: JobConfig = field(default_factory=JobConfig)
    run: RunConfig = field(default_factory=RunConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    rpc: RpcConfig = field(default_factory=RpcConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    serve_check: ServeCheckConfig = field(default_factory=ServeCheckConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
