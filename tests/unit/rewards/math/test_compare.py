"""Which answers are the reference and which only look like it, and what hostile ones cost."""

import pytest

from megatron_r1.rewards.math.policy import MathPolicy
from megatron_r1.rewards.math.scorer import answers_agree
from tests.timed import cpu_seconds

SAME = [
    # what the issue names
    (r"\sqrt{1/n}", r"1/\sqrt n"),
    ("pi/2", r"\frac{\pi}{2}"),
    ("-1+exp(16)", "e^{16}-1"),
    ("14.0 + -1.0i", "14-i"),
    ("0<x<12.5", "(0,12.5)"),
    (r"\text{Monday}", "Monday"),
    ("1 1/2", "1.5"),
    # numbers
    ("1234", "1,234"),
    (r"11,\!880", "11880"),
    ("1{,}000{,}000", "1000000"),
    ("8.0", "8"),
    ("8.", "8"),
    (".5", "1/2"),
    ("2/4", "0.5"),
    ("+3", "3"),
    ("\u22123", "-3"),
    ("1e3", "1000"),
    (r"3 \times 10^{8}", "300000000"),
    ("007", "7"),
    (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", r"\frac16"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"2\frac{1}{2}", "5/2"),
    (r"-1\frac12", "-1.5"),
    (r"\dfrac{1}{2}", r"\tfrac12"),
    ("2**10", "1024"),
    ("2^10", "1024"),
    ("2516_8", "2516_{8}"),
    # expressions
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
    ("sqrt(2)/2", r"\frac{\sqrt{2}}{2}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"2^{1/2}", r"\sqrt{2}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x(x+1)", r"x^2 + x"),
    ("2ab", "b*2*a"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sin^2 x", r"1-\cos^2(x)"),
    (r"\tan\frac{\pi}{4}", "1"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\sin^{-1} \frac12", r"\arcsin(1/2)"),
    (r"\log_2 8", "3"),
    (r"\ln e^2", "2"),
    (r"2\log 3", r"\log 9"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    ("n!/(n-1)!", "n"),
    (r"|{-3}|", "3"),
    (r"\left|x\right|", r"\sqrt{x^2}"),
    (r"\lfloor 3.7 \rfloor", "3"),
    (r"\sqrt2\sqrt2-2", "0"),
    ("(1+i)(1-i)", "2"),
    ("i^2", "-1"),
    ("1/2006!", r"\frac{1}{2006!}"),
    ("2^{-99}", "1/2^{99}"),
    (r"\alpha + \beta", r"\beta+\alpha"),
    ("a_{1}+a_2", "a_2 + a_1"),
    # names, equations, inequalities
    ("x = 5", "5"),
    ("5", "x=5"),
    ("x = 4/2 = 2", "2"),
    ("f(x) = 2x", "2x"),
    (r"\text{Area} = 12", "12"),
    ("y = 2x+3", "2x - y + 3 = 0"),
    ("2x+2y=2", "x+y=1"),
    ("x > 3", r"(3,\infty)"),
    ("3 < x", "x>3"),
    (r"x \le 3", r"(-\infty, 3]"),
    ("5 > x >= 2", "[2,5)"),
    (r"x\ne 1", r"(-\infty,1)\cup(1,\infty)"),
    (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"),
    (r"x \in [1,2]", r"\left[1, 2\right]"),
    ("x+y<2", "2>y+x"),
    # several answers
    (r"\left(\frac12, 3\right)", "(0.5,3)"),
    (r"\{1,2,3\}", "{3,2,1}"),
    ("1,2", "2, 1"),
    ("1 and 2", "1,2"),
    ("$x=1$ or $x=2$", "1,2"),
    ("1, 2, and 3", "1,2,3"),
    (r"\pm 2", "2,-2"),
    (r"x = 1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 8/2 \end{bmatrix}"),
    ("3:2", "3 : 2"),
    (r"1, 3, 5, \ldots", "1,3,5,..."),
    (r"\emptyset", r"\{\}"),
    (r"[0,1) \cup (2,3]", r"(2,3]\cup[0,1)"),
    # units, words, wrapping
    ("$1,234.50", "1234.5"),
    ("-$5", "-5"),
    (r"\$18", "18"),
    ("$18$", "18"),
    (r"\(18\)", "18"),
    (r"\boxed{18}", "18"),
    ("50%", "50"),
    (r"50 \%", "50"),
    (r"30^\circ", "30"),
    ("30 degrees", r"30^{\circ}"),
    ("8 apples", "8"),
    (r"8\text{ cm}^2", "8"),
    (r"8\text{ cm}^2", "8 square centimeters"),
    (r"60 \text{ miles per hour}", "60 mph"),
    (r"\textbf{(D)}", "D"),
    ("(D)", r"\text{D}"),
    ("monday", "Monday"),
    ("Monday.", "Monday"),
    ("x + 1", "x  +\n1"),
    (r"10:30\text{ a.m.}", r"10:30 \text{ a.m.}"),
    (r"2\,\pi\; r", r"2\pi r"),
]

DIFFERENT = [
    # what the issue names
    ("1/2^{99}", "1/2^{98}"),
    ("1/2004!", "1/2006!"),
    ("1-1/e", "1+1/e"),
    ("{1,2}", "(1,2)"),
    (r"\{1,2\}", "(1,2)"),
    ("4", r"4\sqrt2"),
    ("1,2,3,...", "1,2,4,..."),
    (r"1,3,5,\ldots", r"1,3,5,7,\ldots"),
    (r"1+\frac12+\cdots", r"1+\frac13+\cdots"),
    ("x-x=0", "y=y"),
    ("0=0", "1=1"),
    # numbers
    ("12", "1,2"),
    ("1 2", "12"),
    ("1,2345", "12345"),
    ("8.0000000000000000000000001", "8"),
    ("0.3333333333333333", "1/3"),
    ("3.14159265358979323846", r"\pi"),
    ("1/0", "0"),
    ("1/0", "2/0"),
    ("0^0", "1"),
    ("nan", "0"),
    ("inf", "1e99"),
    ("1_0", "10"),
    ("101_2", "5"),
    ("101_2", "101_3"),
    ("0x10", "16"),
    ("\u0664", "4"),
    ("\u00b2", "2"),
    ("8%%", "8"),
    ("5!!", "15"),
    ("1e999999999", "1e999999998"),
    (r"2\frac12", "1"),
    (r"1\frac{1}{2}", "1/2"),
    ("10^{400}+1", "10^{400}"),
    ("2^{20000}+1", "2^{20000}"),
    (r"10^{50}\pi+1", r"10^{50}\pi"),
    (r"10^{-1000}\pi", "0"),
    ("9^{9^9}", "9^{9^8}"),
    ("(-1)^{1/3}", "-1"),
    # expressions
    ("2x", "2"),
    ("2t", "2"),
    ("5m", "5"),
    ("x", "X"),
    ("x^2", "2x"),
    ("x+y", "x-y"),
    (r"\sqrt{x^2}", "x"),
    ("|x-100|+x", "100"),
    (r"\sqrt{2}", r"\sqrt[3]{2}"),
    (r"\log 5", "2"),
    (r"\ln 10", r"\log 10"),
    (r"\sin 30", r"\sin 30^\circ"),
    (r"\pi/6", r"30^\circ"),
    ("3i", "3"),
    ("1+2i", "1-2i"),
    ("e", "2.718281828459045"),
    ("n!", "n"),
    (r"\binom{5}{2}", r"\binom{5}{1}"),
    ("x^{5000}", "x^{5001}"),
    (r"\int_0^1 x dx", "1/3"),
    (r"\sum_{n=1}^{\infty} \frac{1}{n^2}", r"\sum_{n=1}^{\infty} \frac{1}{n^3}"),
    # names, equations, inequalities
    ("7=8", "8"),
    ("8=7", "8"),
    ("x=7=8", "8"),
    ("x=5", "y=5"),
    ("x=5", "x"),
    ("x^2=1", "x=1"),
    ("x^2+y^2=1", "x+y=1"),
    ("x = 3 = 5", "x=5"),
    ("x>3", "x<3"),
    ("x>3", r"x \ge 3"),
    ("x>3", "3"),
    ("0<x<5", "[0,5)"),
    (r"x \le 3", r"(-\infty, 3)"),
    ("x<1 and x>3", r"(-\infty,1)\cup(3,\infty)"),
    ("x+y<2", "x+y>2"),
    # several answers
    ("(0,1]", "(0,1)"),
    ("(1,2)", "(2,1)"),
    ("1,2", "(1,2)"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("1,1,2", "1,2,2"),
    ("1 or 2", "2"),
    (r"\pm 2", "2"),
    ("(1,2)", "[1,2]"),
    ("(1,234)", "1234"),
    ("x=1,y=2", "x=2,y=1"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("3:2", "2:3"),
    ("3:2", "1.5"),
    (r"[0,1)\cup(2,3]", r"[0,1)\cup(2,3)"),
    (r"\emptyset", "0"),
    # units and words
    ("5 million", "5"),
    ("5 dozen", "5"),
    (r"5\text{ or 6}", "5"),
    (r"5\text{, 6}", "5"),
    (r"5 \text{ and a half}", "5"),
    ("2 sevenths", "2"),
    ("5 below zero", "5"),
    ("5 unless x", "5"),
    ("5 to 6", "5"),
    ("5 lakh", "5"),
    ("5 squared", "5"),
    ("not 5", "5"),
    ("5 is wrong, 6", "5"),
    ("5 cm", "5 km"),
    ("5 cm", "5 m"),
    (r"5\text{ cm}", r"5\text{ cm}^2"),
    ("$5", "5 euros"),
    ("Monday", "Tuesday"),
    ("no", "on"),
    ("Yes", "No"),
    ("(A)", "(B)"),
    ("even", "odd"),
    ("5 or maybe 6", "5"),
    ("", ""),
    (" ", "8"),
    ("$", "$$"),
    ("__import__('os')", "8"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_answers_that_agree(answer, reference):
    assert answers_agree(answer, reference)
    assert answers_agree(reference, reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_answers_that_do_not_agree(answer, reference):
    assert not answers_agree(answer, reference)
    assert not answers_agree(reference, answer)


def test_a_slip_of_the_answer_is_not_mended():
    assert not answers_agree("--8", "8")
    assert not answers_agree("8 8", "8")


@pytest.mark.parametrize(
    ("policy", "answer", "reference", "same"),
    [
        ({"percent": "unit"}, "50%", "50", True),
        ({"percent": "unit"}, "50%", "0.5", False),
        ({"percent": "unit"}, "50%", r"50\%", True),
        ({"percent": "hundredth"}, "50%", "50", False),
        ({"percent": "hundredth"}, "0.5", "50%", True),
        ({"percent": "hundredth"}, "50%", r"50\%", True),
        ({"percent": "either"}, "50%", "50", True),
        ({"percent": "either"}, "50%", "0.5", True),
        ({"percent": "either"}, "50%", "5", False),
        ({"units": "required"}, "5 cm", "5", False),
        ({"units": "required"}, "5", "5 cm", False),
        ({"units": "required"}, "5 centimeters", r"5\text{ cm}", True),
        ({"units": "ignored"}, "5 cm", "5 km", True),
        ({"units": "ignored"}, "5 cm", "6 cm", False),
        ({"rounding": 3}, "0.333", "1/3", True),
        ({"rounding": 3}, "0.33", "1/3", False),
        ({"rounding": 3}, "0.334", "1/3", False),
        ({"rounding": 3}, "-3.142", r"-\pi", True),
        ({"rounding": 3}, "3.142", r"-\pi", False),
        ({"rounding": 3}, "3.14159", "3.14160", False),
        ({"rounding": 3}, "123.46", "123.456", False),
        ({"rounding": 3}, "333", "1000/3", False),
        ({"list_order": "same"}, "2,1", "1,2", False),
        ({"list_order": "same"}, "1,2", "1,2", True),
        ({"list_order": "same"}, r"\{2,1\}", r"\{1,2\}", True),
    ],
)
def test_policies(policy, answer, reference, same):
    assert answers_agree(answer, reference, MathPolicy(**policy)) == same


@pytest.mark.parametrize(
    "field", [{"percent": "no"}, {"units": "metric"}, {"rounding": -1}, {"rounding": "3"}, {"several_answers": ""}]
)
def test_an_unknown_policy_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        MathPolicy(**field)


BOMBS = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "(((9!)!)!)!",
    "9!!!!!!!!",
    "10^{10^{10}}!",
    "e^{e^{e^{e^{e}}}}",
    r"\exp(\exp(\exp(9)))",
    r"\sinh(10^{9})",
    r"\binom{10^9}{10^8}",
    r"\sin(10^{10^5})",
    "2^{3000}" * 60,
    "+".join(f"1/{n}^{{{n + 90}}}" for n in range(2, 60)),
    "(1+1/7^{900})^{9}" * 20,
    "x^{999}" * 60,
    r"\sqrt{" * 100 + "2" + "}" * 100,
    "(" * 400,
    "{" * 500 + "}" * 500,
    r"\frac" * 200,
    r"\frac{1}{" * 60 + "2" + "}" * 60,
    r"\boxed{" * 140 + "8" + "}" * 140,
    "-" * 1000,
    "1," * 500,
    "1 " * 500,
    ",".join(rf"\sin({n}x)" for n in range(32)),
    "\\{" * 300,
    r"\begin{pmatrix}" * 60,
    "a" * 1000,
    "1" * 1000,
    "|" * 1000,
    r"\text{" * 150,
    "$" * 1000,
    r"\pm" * 300 + "8",
    r"\pm 1" * 100,
    "x=" * 300 + "8",
    r"\sum_{n=1}^{10^{9}} n",
    r"\frac.5 2",
    r"\frac1e9 2",
    r"\int_0^{\infty} e^{-x^2} dx",
    "\\\\" * 400,
    "." * 1000,
    "8%" * 400,
    "8^" * 400 + "8",
    "8_" * 400 + "8",
    "8!" + "^8!" * 100,
]


@pytest.mark.parametrize("reference", ["8", r"\frac{\pi}{2}", "x^2+1", "(1,2)", r"\approx 8.24 \text{ mph}", r"\sum_{n=1}^{9} n"])
def test_bombs_are_refused_at_once(reference):
    for bomb in BOMBS:
        seconds, agrees = cpu_seconds(answers_agree, bomb, reference)
        assert seconds < 0.5 and not agrees, bomb


def test_what_the_own_reader_cannot_read_goes_to_math_verify_guarded():
    assert answers_agree(r"2\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix} \cdot 2")
    assert not answers_agree(r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{vmatrix}1&2\\3&5\end{vmatrix}")
    assert not answers_agree(r"\sum_{n=1}^{4} n", r"\sum_{n=1}^{3} n")
