"""RMiPO's loss in TRL's own `DPOTrainer`: three methods are overridden, everything else stays TRL's.

    python examples/trl_dpo_trainer.py MODEL DATASET

Two traps of `DPOTrainer`: a full-parameter run loads a second model as reference unless `precompute_ref_log_probs` is
set; and what that option computes once, before training, are the "reference" columns below. Here they hold log pi(y), the
responses scored without their prompts, under the initial policy. It is `prior_model: initial` of our own trainer, which
also offers the current policy's prior and needs about a third of the time of a step.
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from rmipo import rmipo_loss


def assistant_header(tokenizer) -> list[int]:
    """What the template writes between a prompt and its response, behind the BOS token where the family has one."""
    question = [{"role": "user", "content": "?"}]
    bare, prompt = (
        tokenizer.apply_chat_template(question, add_generation_prompt=header, return_dict=False)
        for header in (False, True)
    )
    starts_with_bos = prompt[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] * starts_with_bos + prompt[len(bare) :]


class RMiPOinDPOTrainer(DPOTrainer):
    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL names its cache after model and data, not after what is computed: a DPO run has other columns there.
        self._precompute_model_hash = f"prior of {self._precompute_model_hash}"
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        """log pi(y) of both responses: behind the assistant header alone. TRL caches it beside the dataset."""
        header = torch.tensor(assistant_header(self.processing_class), device=inputs["input_ids"].device)
        sums = []
        for ids, mask in zip(inputs["input_ids"], inputs["completion_mask"].bool(), strict=True):
            row = torch.cat([header, ids[mask]])[None]
            with torch.no_grad(), self.accelerator.autocast():
                logits = model(input_ids=row, use_cache=False).logits[0, len(header) - 1 : -1]
            sums.append(logits.float().log_softmax(-1).gather(1, ids[mask][:, None]).sum())
        return torch.stack(sums).chunk(2)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        completion = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, use_cache=False,
            fused_lm_head=True,
        )  # fmt: skip
        chosen_logps, rejected_logps = outputs.log_probs.sum(1).chunk(2)
        chosen_lengths, rejected_lengths = completion[:, 1:].sum(1).chunk(2)
        losses, gamma = rmipo_loss(
            chosen_logps,
            rejected_logps,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            chosen_lengths,
            rejected_lengths,
        )
        self._metrics["train" if model.training else "eval"]["gamma"].append(gamma.mean().item())
        return (losses.mean(), outputs) if return_outputs else losses.mean()


if __name__ == "__main__":
    model, dataset = sys.argv[1:]
    files = {"path": "json", "data_files": dataset} if Path(dataset).is_file() else {"path": dataset}
    on_cpu = not torch.cuda.is_available()
    args = DPOConfig(
        output_dir="outputs/rmipo-in-dpo-trainer",
        precompute_ref_log_probs=True,
        max_length=128,
        use_cpu=on_cpu,
        bf16=not on_cpu,
    )
    RMiPOinDPOTrainer(model, args=args, train_dataset=load_dataset(**files, split="train")).train()
