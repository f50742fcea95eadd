"""verl's vLLM replica with the CPU worker extension; everything else is verl's."""

from __future__ import annotations

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class CPUHttpServer(vLLMHttpServer):
    def _get_worker_extension_cls(self) -> str:
        return "verl_prefix.cpu.vllm_worker.CPUWorkerExtension"


class CPUReplica(vLLMReplica):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CPUHttpServer)
