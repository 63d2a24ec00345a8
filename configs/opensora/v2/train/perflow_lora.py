# A fragment: adapters on the blocks' linear layers. Without its adapters the network is the teacher, so that there is one copy.

lora_config = dict(
    r=64,  # rank
    lora_alpha=64,  # adapters count lora_alpha / r
    target_modules=[
        "q_proj",
        "k_proj",
        "v_proj",
        "proj",
        "v_mlp",
        "linear2",
        "img_mlp.0",
        "img_mlp.2",
        "txt_mlp.0",
        "txt_mlp.2",
    ],
)
