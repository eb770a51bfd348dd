"""The recipe of the small model that ships: a VQGAN, a DalleBart and a CLIP trained on emoji."""
