"""Transferable visual prompting: one prompt of pixels, learned on one frozen multimodal language model, that helps the others."""
__version__ = "0.1.0"

from tvp.explorer import TransferExplorer
from tvp.learner import Learner, NormalizedGradient
from tvp.losses import FeatureConsistency, TaskLoss, TaskSemantics, tvp_losses
from tvp.mllm import Clip, Mllm
from tvp.prompt import VisualPrompt
from tvp.recipes import RECIPES, make_learner
from tvp.ship import load_prompt, prompt_names
from tvp.tasks import Split, Task, load_task, task_names
from tvp.transfer import TransferResults, evaluate_transfer
from tvp.widgets import TrainingStepper
from tvp.zoo import Zoo, load_clip, load_mllm, load_zoo

__all__ = ["RECIPES", "Clip", "FeatureConsistency", "Learner", "Mllm", "NormalizedGradient", "Split", "Task", "TaskLoss", "TaskSemantics",
           "TrainingStepper", "TransferExplorer", "TransferResults", "VisualPrompt", "Zoo", "evaluate_transfer", "load_clip", "load_mllm", "load_prompt", "load_task", "load_zoo", "make_learner",
           "prompt_names", "task_names", "tvp_losses"]
