"""The imports of workers, for the server that forks them; nothing here may start a thread."""

import support.elastic
import support.service_training  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
