from tests.evaluation.conftest import recorded, student, t5_config

__all__ = ["recorded", "student", "t5_config"]
