"The public names and the rooms they live in: what `import tvp` offers, loaded when it is asked for."

from .explorer import TransferExplorer as TransferExplorer
from .learner import Learner as Learner
from .losses import FeatureConsistency as FeatureConsistency
from .losses import LayerConsistency as LayerConsistency
from .losses import TaskLoss as TaskLoss
from .losses import TaskSemantics as TaskSemantics
from .losses import tvp_losses as tvp_losses
from .mllm import Clip as Clip
from .mllm import Mllm as Mllm
from .prompt import VisualPrompt as VisualPrompt
from .recipes import RECIPES as RECIPES
from .recipes import make_learner as make_learner
from .ship import load_prompt as load_prompt
from .ship import prompt_names as prompt_names
from .tasks import Split as Split
from .tasks import Task as Task
from .task_loading import load_task as load_task
from .task_loading import task_names as task_names
from .transfer import TransferResults as TransferResults
from .transfer import evaluate_transfer as evaluate_transfer
from .updates import NormalizedGradient as NormalizedGradient
from .widgets import TrainingStepper as TrainingStepper
from .zoo import Zoo as Zoo
from .zoo import load_clip as load_clip
from .zoo import load_mllm as load_mllm
from .zoo import load_zoo as load_zoo
