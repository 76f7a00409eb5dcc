"""How far an audit is: a line as each student ends, also where nobody sees a bar."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remos_hf.auditing.cells import Cell


@dataclass
class Progress:
    """What one process of an audit has made, and how long that took.

    Attributes:
        total: Students of the audit.
        tell: Takes a line.
        done: Students that are done, whoever made them.
        teacher_seconds: What each teacher took that was made here.
        student_seconds: What each student took that was made here: trained, exposed, measured.
    """

    total: int
    tell: Callable[[str], None]
    done: int = 0
    teacher_seconds: list[float] = field(default_factory=list)
    student_seconds: list[float] = field(default_factory=list)

    def ended(self, cell: "Cell", accuracy: float, seconds: float, teachers_left: int) -> None:
        """Tell that a student was made and measured.

        Args:
            cell: The student.
            accuracy: Its own, in [0, 1].
            seconds: What it took, teachers left out.
            teachers_left: Teachers that are still to be made.
        """
        self.student_seconds.append(seconds)
        self.done += 1
        a_student = statistics.fmean(self.student_seconds)
        a_teacher = statistics.fmean(self.teacher_seconds or [a_student])
        left = (self.total - self.done) * a_student + teachers_left * a_teacher
        self.tell(
            f"student {self.done} of {self.total}, {cell.kind}, {cell.student}, seed {cell.seed}: accuracy "
            f"{100 * accuracy:.1f} %; {minutes_told(left)}"
        )


def minutes_told(seconds: float) -> str:
    """Say how long something will take, to the minute."""
    minutes = round(seconds / 60)
    return "less than a minute left" if minutes < 1 else f"about {minutes:,} minute{'s' * (minutes > 1)} left"
