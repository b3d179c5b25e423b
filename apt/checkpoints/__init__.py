"""Models on disk: a folder with `apt.json` and safetensors, read strictly, never from pickles.

    apt.json                   describes the model: see `apt.checkpoints.info.ModelInfo`
    transformer.safetensors    the backbone
    text_encoder.safetensors   the text encoder, if its weights belong to this model
    codec.safetensors          the latent codec, likewise

A folder can also be a diffusers pipeline, with or without an apt.json, and a backbone can be a
single file in the layout of its authors. This package has two layers. Below `apt.models`, these
read and write files: `reading`, `info`, `source`, `runs`, `scales`, `foreign`, `layouts`,
`weights`, `origin`, `external`, `lora`. Above it, these handle whole models: `public`, `load`,
`save`, `export`.
"""
