"""A tiny ChatGLM-6B v1 whose outputs the published code has written down.

The published code of ChatGLM-6B no longer runs beside today's transformers. It was run once, where it
still does, on a tiny random model; its inputs and outputs lie in a folder of reference numbers. The
image's part of that run is its last layer, the projection from Q-Former to language model, on random
Q-Former outputs.
"""

from pathlib import Path

from torch import nn


def golden_chatglm(
    folder: Path,  # .../golden/visualglm
    # 28: the published blocks, which are never told how many they are; 3: blocks that know
    residual_layers: int = 28,
) -> tuple[nn.Module, nn.Linear]:  # language model, and projection from Q-Former to language model
    "The tiny ChatGLM-6B v1 whose outputs the published code has written down."
    import json

    from tvp._loading import load_safetensors
    from tvp.models.paper.modeling_chatglm import ChatGLMConfig, ChatGLMForCausalLM

    config = json.loads((Path(folder) / "golden.json").read_text())["config"]
    renamed = {
        "num_layers": "num_hidden_layers",
        "inner_hidden_size": "intermediate_size",
        "layernorm_epsilon": "layer_norm_eps",
    }
    known = {
        renamed.get(name, name): value
        for name, value in config.items()
        if name not in ("eva_config", "qformer_config")
    }
    model = ChatGLMForCausalLM(ChatGLMConfig(**known, residual_layers=residual_layers))
    weights = load_safetensors(Path(folder) / "state_dict.safetensors")
    image = {name: weights.pop(name) for name in list(weights) if name.startswith("image_encoder.")}
    model.load_state_dict(
        {name: value for name, value in weights.items() if not name.endswith("inv_freq")}
    )
    projection = nn.Linear(config["qformer_config"]["hidden_size"], config["hidden_size"])
    projection.load_state_dict(
        {name.removeprefix("image_encoder.glm_proj."): value for name, value in image.items()}
    )
    return model.eval().requires_grad_(False), projection.requires_grad_(False)
