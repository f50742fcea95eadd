"""Weight synchronisation into vLLM's CPU engine.

The CPU engine repacks weights after loading, so verl's `model.load_weights` on live parameters fails from the second
load on. vLLM's own `reload_weights` restores the unpacked layout first, but needs all weights at once.
"""

from __future__ import annotations

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive every bucket, then reload the model with them. LoRA adapters are not supported here."""
        if peft_config:
            raise NotImplementedError("The CPU engine synchronises full weights only; set model.lora_rank=0.")
        self.device = self.device or torch.device("cpu")
        weights: list[tuple[str, torch.Tensor]] = []

        def collect(bucket, is_last: bool) -> None:
            # The transfer buffer is reused for the next bucket.
            weights.extend((name, tensor.clone()) for name, tensor in bucket)

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=collect)
        self.model_runner.reload_weights(weights_iterator=iter(weights))
