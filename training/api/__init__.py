"""PAT in a notebook: any model of a known family, any stock Trainer, and a run/ that pat-export takes.

    model = AutoModelForCausalLM.from_pretrained(base)
    model = apply_pat(model, PatConfig(ratio=0.25), calibration=examples[:128])
    Trainer(model, args, train_dataset=examples, callbacks=[PatCallback()]).train()
    save_run(model, "run")

The method's losses reach the Trainer's through a forward hook on the PEFT model, so no Trainer has to be subclassed.
"""

from pat_serve.training.api.apply import PatConfig, apply_pat
from pat_serve.training.api.callback import PatCallback
from pat_serve.training.api.save import save_run

__all__ = ["PatCallback", "PatConfig", "apply_pat", "save_run"]
