"""Training from files alone: stored chains as a training set, encoded captions as text encoders.

Importing this module registers "perflow_stored" in the host's DATASETS. `opensora-perflow store` and `encode` write the files.
In Open-Sora 1.2 and 1.3 "perflow_encoded" and "perflow_latents" are registered in MODELS, too:

    custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.stored"], allow_failed_imports=False)
    scheduler = dict(type="perflow", teacher=dict(stored="store"), guidance=dict(mode="fixed", scale=7.0), ...)
    dataset = dict(type="perflow_stored")
    text_encoder = dict(type="perflow_encoded", folder="store/text")
    vae = dict(type="perflow_latents", out_channels=4)
    load_video_features = True

In Open-Sora 2.0:

    model = dict(type="perflow_flux", perflow=dict(teacher=dict(stored="store"), guidance=dict(...), ...), ...)
    dataset = dict(type="perflow_stored")
    t5 = dict(type="perflow_encoded_t5", folder="store/text")
    clip = dict(type="perflow_encoded_clip", folder="store/text")
    cached_video = True
"""

try:
    from opensora import registry
except ImportError as error:
    raise ImportError(
        "opensora_perflow.hosts.stored registers a training set in Open-Sora's DATASETS, and the package `opensora` could not "
        f"be imported ({error}); run the script through `python -m opensora_perflow.run SCRIPT`, or put the checkout of "
        "hpcaitech/Open-Sora on PYTHONPATH"
    ) from error

if hasattr(registry, "SCHEDULERS"):
    import opensora_perflow.hosts.v1.stored
else:
    import opensora_perflow.hosts.v2.stored  # noqa: F401
