"""minDALL-E of Kakao Brain."""
