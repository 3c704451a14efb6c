"""Numbers as the files of a run hold them: those that are absent, or null, are NaN."""

import math
from typing import Annotated

from pydantic import BeforeValidator

NAN = math.nan
Number = Annotated[float, BeforeValidator(lambda value: NAN if value is None else value)]
