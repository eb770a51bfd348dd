"""Models on the devices: prompts to tokens, tokens to images, images to scores."""
