"""One engine of vLLM in a process of its own: ``python engine.py JOB RESULT``, two JSON files.

A job has the arguments of the engine, the adapters (name, number, folder) and steps: ``{"load": NAME}`` or
``{"batch": [[NAME or null, prompt], ...]}``, each generated from at temperature 1. The result has for each step the
error, or for each prompt the tokens and their log-probabilities.
"""

import json
import sys
from pathlib import Path

# Of every process with an engine. One thread, not bound to a core: tests share the machine.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(job_file).read_text())
    engine = LLM(skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, block_size=32, seed=0, **job["engine"])
    adapters = {name: LoRARequest(name, number, path) for name, number, path in job["adapters"]}
    sampled = SamplingParams(max_tokens=8, temperature=1.0, seed=1, logprobs=0, detokenize=False, ignore_eos=True)

    def do(step: dict) -> dict | list:
        if "load" in step:
            engine.llm_engine.add_lora(adapters[step["load"]])
            return []
        names, prompts = zip(*step["batch"], strict=True)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampled,
            lora_request=[adapters.get(name) for name in names],
            use_tqdm=False,
        )
        best = [output.outputs[0] for output in outputs]
        return [
            [list(one.token_ids), [at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)]]
            for one in best
        ]

    results = []
    for step in job["steps"]:
        try:
            results.append(do(step))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    Path(result_file).write_text(json.dumps(results))
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
