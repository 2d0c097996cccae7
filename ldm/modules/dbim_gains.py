"""DBIM's three constants, for the formula and for the settings, which load without torch."""

TOKEN_GAIN = 10.0      # sharpens the softmax over tokens of Eq 3 (release behavior; the paper's text has no number)
SPATIAL_GAIN = 10.0    # sharpens the softmax over pixels of Eq 4
MASK_SUM = 500.0       # what Eq 4's spatial masks sum to in every layer at 512x512
