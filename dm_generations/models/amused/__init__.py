"""aMUSEd: text to image tokens by masked parallel decoding."""
