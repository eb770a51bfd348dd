"""The models, one folder each: config, network and checkpoint formats. `registry` lists them, `loading` loads them."""
