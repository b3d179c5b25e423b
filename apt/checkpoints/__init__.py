"""Models on disk: a folder of `apt.json` and safetensors, read strictly, never from pickles.

    apt.json                   what the model is: see `apt.checkpoints.info.ModelInfo`
    transformer.safetensors    the backbone
    text_encoder.safetensors   the text encoder, if its weights belong to this model
    codec.safetensors          the latent codec, likewise

A folder can also be a pipeline of diffusers, with or without an apt.json, and a backbone can be one
file in the layout of its authors. The room has two floors. Below the models, which are filled from
it, is what a file is: `reading`, `info`, `source`, `runs`, `scales`, `foreign`, `layouts`,
`weights`, `origin`, `external`, `lora`. Above them is what a model is: `public`, `load`, `save`,
`export`.
"""
