"The public names and the rooms they live in: what `import tvp` offers, loaded when it is asked for."

from .widgets.explorer import TransferExplorer as TransferExplorer
from .training.learner import Learner as Learner
from .training.losses import FeatureConsistency as FeatureConsistency
from .training.losses import LayerConsistency as LayerConsistency
from .training.losses import TaskLoss as TaskLoss
from .training.losses import TaskSemantics as TaskSemantics
from .training.losses import tvp_losses as tvp_losses
from .models.adapters import Clip as Clip
from .models.adapters import Mllm as Mllm
from .prompts.visual_prompt import VisualPrompt as VisualPrompt
from .training.recipes import RECIPES as RECIPES
from .training.recipes import make_learner as make_learner
from .prompts.loading import load_prompt as load_prompt
from .prompts.loading import prompt_names as prompt_names
from .tasks.task import Split as Split
from .tasks.task import Task as Task
from .tasks.loading import load_task as load_task
from .tasks.loading import task_names as task_names
from .evaluation.results import TransferResults as TransferResults
from .evaluation.transfer import evaluate_transfer as evaluate_transfer
from .training.optimizers import NormalizedGradient as NormalizedGradient
from .widgets.stepper_view import TrainingStepper as TrainingStepper
from .models.zoo import Zoo as Zoo
from .models.zoo import load_clip as load_clip
from .models.zoo import load_mllm as load_mllm
from .models.zoo import load_zoo as load_zoo
