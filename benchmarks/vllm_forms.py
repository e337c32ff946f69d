"""Agreement with vLLM over the forms of a draft, with random drafts of a tiny random target.

Texts of random models are as good as any: what is compared are the numbers of drafts and of accepted guesses of
each prompt, which differ as soon as the two sides compute another draft.

    python benchmarks/vllm_forms.py --python VLLM_ENV/bin/python [--speculators] [FORM ...]

Exit code 0: all counts agree.
"""

import argparse
import sys
import tempfile
import threading
from pathlib import Path

import processes  # noqa: F401 - puts tests/ on the path
from support.guessing_drafts import (
    FORMS,
    NEW_TOKENS,
    export_random_draft,
    likely_tokens,
    random_prompts,
    random_target,
)

from eagle_rpc.config.schema import EvaluateConfig
from eagle_rpc.evaluate import ServedDraft, decode_here
from eagle_rpc.serving import load_export
from eagle_rpc.serving.engine_run import decode_in_engine
from eagle_rpc.serving.engine_side import DecodingWork
from eagle_rpc.serving.speculators_config import Speculators

GUESSES = 4
SECONDS = 3600.0
NEAR_TIE = EvaluateConfig().near_tie


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter of an environment with vLLM")
    parser.add_argument("--speculators", action="store_true", help="export in the form of speculators")
    parser.add_argument("forms", nargs="*", default=list(FORMS), help=f"of {', '.join(FORMS)}")
    arguments = parser.parse_args()
    model, agreed = random_target(), True
    with tempfile.TemporaryDirectory() as scratch:
        target, log = Path(scratch, "target"), Path(scratch, "vllm.log")
        model.save_pretrained(target)
        beside = Speculators(str(target), GUESSES) if arguments.speculators else None
        for form in arguments.forms:
            draft = Path(scratch, form)
            export_random_draft(model, likely_tokens(model), form, draft, beside)
            work = DecodingWork(
                "vllm", str(target), str(draft), "float32", random_prompts(), NEW_TOKENS, GUESSES, []
            )
            ours = decode_here(model, load_export(draft), work)
            theirs = decode_in_engine(
                arguments.python, work, log=log, seconds=SECONDS, stop=threading.Event()
            )
            served = ServedDraft(engine="vllm", ours=ours, theirs=theirs, control=None, near_tie=NEAR_TIE)
            print(f"{form}\n{served.summary()}", flush=True)
            agreed = agreed and served.is_ours
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
