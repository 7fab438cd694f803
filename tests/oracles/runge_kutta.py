"""Explicit Runge-Kutta methods in plain torch, differentiable by ordinary back-propagation.

The tables are those of PETSc's TSRK, written down from the literature and kept as exact fractions, so that
`order_defect` can tell whether a table has the order it claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import combinations_with_replacement, pairwise
from typing import Any

import torch

State = Any
Tree = tuple["Tree", ...]


@dataclass(frozen=True)
class Tableau:
    """A Butcher tableau: `stages[i]` are the weights of the earlier stages in stage i, `weights` those of the step."""

    order: int
    stages: tuple[tuple[Fraction, ...], ...]
    weights: tuple[Fraction, ...]

    @property
    def nodes(self) -> tuple[Fraction, ...]:
        """The stage times, as fractions of the step: the sums of the rows."""
        return tuple(sum(row, Fraction(0)) for row in self.stages)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the result of the step."""
        return len(self.weights) > 1 and (*self.stages[-1], Fraction(0)) == self.weights

    @property
    def contributing_stages(self) -> int:
        """The number of stages that the result of a step depends on."""
        needed = {i for i, weight in enumerate(self.weights) if weight != 0}
        for i in reversed(range(len(self.weights))):
            if i in needed:
                needed |= {j for j, weight in enumerate(self.stages[i]) if weight != 0}
        return len(needed)


def tableau(order: int, text: str) -> Tableau:
    """A tableau from the rows of its lower triangle and then its weights, separated by semicolons."""
    *stages, weights = (tuple(Fraction(entry) for entry in row.split()) for row in text.split(";"))
    assert [len(row) for row in (*stages, weights)] == [*range(1, len(weights)), len(weights)]
    return Tableau(order, ((), *stages), weights)


Vector = tuple[Fraction, ...]
"""A sum of the state before the step (entry 0) and of h times the slopes so far (the others)."""


def traced(order: int, stages: int, program: Callable[[Vector, Callable[[Vector], Vector]], Vector]) -> Tableau:
    """The tableau of a step that is written as a program on the state and on h times the slope at a state."""
    rows: list[Vector] = []

    def slope(state: Vector) -> Vector:
        assert state[0] == 1
        assert not any(state[1 + len(rows) :])
        rows.append(state[1 : 1 + len(rows)])
        return tuple(Fraction(place == len(rows)) for place in range(stages + 1))

    result = program(tuple(Fraction(place == 0) for place in range(stages + 1)), slope)
    assert result[0] == 1
    return Tableau(order, tuple(rows), result[1:])


def plus(*terms: tuple[Fraction | int, Vector]) -> Vector:
    """The weighted sum of vectors."""
    entries = zip(*([weight * entry for entry in vector] for weight, vector in terms), strict=True)
    return tuple(sum(column, Fraction(0)) for column in entries)


def shu_osher(u: Vector, f: Callable[[Vector], Vector]) -> Vector:
    """The third-order method of Shu & Osher 1988: convex sums of Euler steps."""
    first = plus((1, u), (1, f(u)))
    second = plus((Fraction(3, 4), u), (Fraction(1, 4), plus((1, first), (1, f(first)))))
    return plus((Fraction(1, 3), u), (Fraction(2, 3), plus((1, second), (1, f(second)))))


def ketcheson(u: Vector, f: Callable[[Vector], Vector]) -> Vector:
    """The fourth-order method of ten stages in two registers, Ketcheson 2008, section 6."""
    state = u
    for _ in range(5):
        state = plus((1, state), (Fraction(1, 6), f(state)))
    other = plus((Fraction(1, 25), u), (Fraction(9, 25), state))
    state = plus((15, other), (-5, state))
    for _ in range(4):
        state = plus((1, state), (Fraction(1, 6), f(state)))
    return plus((1, other), (Fraction(3, 5), state), (Fraction(1, 10), f(state)))


# Keys are PETSc's names, or ours for tables that PETSc lacks.
TABLEAUX = {
    # Euler 1768.
    "1fe": tableau(1, "1"),
    # Heun 1900: the explicit trapezoidal rule.
    "2a": tableau(2, "1 ; 1/2 1/2"),
    # Runge 1895: the explicit midpoint rule.
    "2b": tableau(2, "1/2 ; 0 1"),
    # Fehlberg 1969, 1(2) with the second-order weights.
    "2f": tableau(2, "1/2 ; 1/256 255/256 ; 1/512 255/256 1/512"),
    # Heun 1900, third order.
    "3h": tableau(3, "1/3 ; 0 2/3 ; 1/4 0 3/4"),
    # The member of Kutta's third-order family with both later stages at 2/3 (Butcher 2016, section 32, case II).
    "3": tableau(3, "2/3 ; -1/3 1 ; 1/4 1/2 1/4"),
    # Bogacki & Shampine 1989, 3(2).
    "3bs": tableau(3, "1/2 ; 0 3/4 ; 2/9 1/3 4/9 ; 2/9 1/3 4/9 0"),
    # Kutta 1901: the classical method.
    "4": tableau(4, "1/2 ; 0 1/2 ; 0 0 1 ; 1/6 1/3 1/3 1/6"),
    # Kutta 1901: the 3/8 rule.
    "4k": tableau(4, "1/3 ; -1/3 1 ; 1 -1 1 ; 1/8 3/8 3/8 1/8"),
    # Fehlberg 1969, 4(5) with the fifth-order weights.
    "5f": tableau(
        5,
        """
        1/4 ;
        3/32 9/32 ;
        1932/2197 -7200/2197 7296/2197 ;
        439/216 -8 3680/513 -845/4104 ;
        -8/27 2 -3544/2565 1859/4104 -11/40 ;
        16/135 0 6656/12825 28561/56430 -9/50 2/55
        """,
    ),
    # Dormand & Prince 1980, 5(4).
    "5dp": tableau(
        5,
        """
        1/5 ;
        3/40 9/40 ;
        44/45 -56/15 32/9 ;
        19372/6561 -25360/2187 64448/6561 -212/729 ;
        9017/3168 -355/33 46732/5247 49/176 -5103/18656 ;
        35/384 0 500/1113 125/192 -2187/6784 11/84 ;
        35/384 0 500/1113 125/192 -2187/6784 11/84 0
        """,
    ),
    # Bogacki & Shampine 1996, 5(4).
    "5bs": tableau(
        5,
        """
        1/6 ;
        2/27 4/27 ;
        183/1372 -162/343 1053/1372 ;
        68/297 -4/11 42/143 1960/3861 ;
        597/22528 81/352 63099/585728 58653/366080 4617/20480 ;
        174197/959244 -30942/79937 8152137/19744439 666106/1039181 -29421/29068 482048/414219 ;
        587/8064 0 4440339/15491840 24353/124800 387/44800 2152/5985 7267/94080 ;
        587/8064 0 4440339/15491840 24353/124800 387/44800 2152/5985 7267/94080 0
        """,
    ),
    # Verner 2010, the "most robust" 6(5) pair of 9 stages.
    "6vr": tableau(
        6,
        """
        9/50 ;
        29/324 25/324 ;
        1/16 0 3/16 ;
        79129/250000 0 -261237/250000 19663/15625 ;
        1336883/4909125 0 -25476/30875 194159/185250 8225/78546 ;
        -2459386/14727375 0 19504/30875 2377474/13615875 -6157250/5773131 902/735 ;
        2699/7410 0 -252/1235 -1393253/3993990 236875/72618 -135/49 15/22 ;
        11/144 0 0 256/693 0 125/504 125/528 5/72 ;
        11/144 0 0 256/693 0 125/504 125/528 5/72 0
        """,
    ),
    # Prince & Dormand 1981, RK8(7)13M, in their rational approximations.
    "8dp": tableau(
        8,
        """
        1/18 ;
        1/48 1/16 ;
        1/32 0 3/32 ;
        5/16 0 -75/64 75/64 ;
        3/80 0 0 3/16 3/20 ;
        29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000 ;
        16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229 -180193667/1043307555 ;
        39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059 790204164/839813087
        800635310/3783071287 ;
        246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935
        6005943493/2108947869 393006217/1396673457 123872331/1001029789 ;
        -1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382
        -48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653 ;
        185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211
        5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418 65686358/487910083 ;
        403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604
        11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525
        248638103/1413531060 0 ;
        14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732
        -1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4
        """,
    ),
    # Verner 2010, the "most robust" 7(6) pair of 10 stages, to the 40 digits that he gives.
    "7vr": tableau(
        7,
        """
        0.005 ;
        -1.0767901234567901234567901234567901234568 1.1856790123456790123456790123456790123457 ;
        0.040833333333333333333333333333333333333333 0 0.1225 ;
        0.63607142857142857142857142857142857142857 0 -2.4444642857142857142857142857142857142857
        2.2633928571428571428571428571428571428571 ;
        -2.5351211079349245229256383554660215487207 0 10.299374654449267920438514460756024913612
        -7.9513032885990579949493217458266876536482 0.793011489231005922012260142711152618238 ;
        1.0018765812524632961969196583094999808207 0 -4.1665712824423798331313938005470971453189
        3.8343432929128642412552665218251378665197 -0.50233333560710847547464330228611765612403
        0.66768474388416077115385092269857695410259 ;
        27.255018354630767130333963819175005717348 0 -42.004617278410638355318645443909295369611
        -10.535713126619489917921081600546526103722 80.495536711411937147983652158926826634202
        -67.343882271790513468549075963212975640927 13.04865761077793746347118702956696476271 ;
        -3.0397378057114965146943658658755763226883 0 10.138161410329801111857946190709700150441
        -6.4293056748647215721462825629555298064437 -1.5864371483408276587115312853798610579467
        1.8921781841968424410864308909131353365021 0.019699335407608869061292360163336442838006
        0.0054416989827933235465102724247952572977903 ;
        -1.4449518916777735137351003179355712360517 0 8.0318913859955919224117033223019560435041
        -7.5831741663401346820798883023671588604984 3.5816169353190074211247685442452878696855
        -2.4369722632199529411183809065693752383733 0.8515899999232617933968976603248614217339 0 0 ;
        0.047425837833706756083569172717574534698932 0 0 0.2562236165937056265996172745827462344816
        0.26951376833074206619473817258075952886764 0.12686622409092782845989138364739173247882
        0.24887225942060071622046449427647492767292 0.0030744837408200631335304388479099184768645
        0.048023809989496943308189063347143123323209 0
        """,
    ),
    # Verner 2010, the "most robust" 8(7) pair of 13 stages, to the 40 digits that he gives.
    "8vr": tableau(
        8,
        """
        0.25 ;
        0.087400846504915232052686327594877411977046 0.025487604938654321753087950620345685135815 ;
        0.042333169291338582677165354330708661417323 0 0.12699950787401574803149606299212598425197 ;
        0.42609505888742261494881445237572274090942 0 -1.5987952846591523265427733230657181117089
        1.5967002257717297115939588706899953707994 ;
        0.050719337296713929515090618138513639239329 0 0 0.25433377264600407582754714408877778031369
        0.20394689005728199465736223777270858044698 ;
        -0.29000374717523110970388379285425896124091 0 0 1.3441873910260789889438681109414337003184
        -2.864777943361442730961110382703656282947 2.6775942995105948517211260646164815438695 ;
        0.098535011337993546469740402980727014284756 0 0 0 0.22192680630751384842024036498197387903583
        -0.18140622911806994312690338288073952457474 0.010944411472562548236922614918038631254153 ;
        0.38711052545731144679444618165166373405645 0 0 -1.4424454974855277571256745553077927767173
        2.9053981890699509317691346449233848441744 -1.8537710696301059290843332675811978025183
        0.14003648098728154269497325109771241479223 0.57273940811495816575746774624447706488753 ;
        -0.16124403444439308100630016197913480595436 0 0 -0.17339602957358984083578404473962567894901
        -1.3012892814065147406016812745172492529744 1.1379503751738617308558792131431003472124
        -0.03174764966396688010692352113804302469898 0.9335129382493366643981106448605688485659
        -0.083786318334733852703300855629616433201504 ;
        -0.019199444881589533281510804651483576073142 0 0 0.27330857265264284907942326254016124275617
        -0.6753497320694437291969161121094238085624 0.34151849813846016071738489974728382711981
        -0.06795006480337577247892051619852462939191 0.096591752247623878884265586491216376509746
        0.13253082511182101180721038466545389951226 0.36854959360386113446906329951531666812946 ;
        0.60918774036452898676888412111588817784584 0 0 -2.2725690858980016768999800931413088399719
        4.7578983426940290068155255881914785497547 -5.5161067066927584824294689667844248244842
        0.2900596369680119270909581856594617437818 0.5691423963359036822910985845480184914563
        0.79267957603321670271339916205893327579951 0.15473720453288822894126190771849898232047
        1.6149708956621816247083215106334544434974 ;
        0.88735762208534719663211694051981022704884 0 0 -2.9754597821085367558513632804709301581977
        5.6007170094881630597990392548350098923829 -5.915607450536674468001493018994165735184
        0.22029689156134927016879142540807638331238 0.10155097824462216666143271340902996997549
        1.1514345647386055909780397752125850553556 1.9297101665271239396134361900805843653065 0 0 ;
        0.044729564666695714203015840429049382466467 0 0 0 0 0.15691033527708199813368698010726645409175
        0.18460973408151637740702451873526277892035 0.2251638060208699104247941940035072197092
        0.14794615651970234687005179885449141753736 0.076055542444955825269798361910336491012732
        0.12277290235018619610824346315921437388535 0.041811958638991631583384842800871882376786 0
        """,
    ),
    # Ralston 1962, the least bound of the error among methods of two stages.
    "2r": tableau(2, "2/3 ; 1/4 3/4"),
    # Ralston 1962, the same for three stages.
    "3r": tableau(3, "1/2 ; 0 3/4 ; 2/9 1/3 4/9"),
    # Strong stability preserving, from their convex sums.
    "3s": traced(3, 3, shu_osher),
    "4s": traced(4, 10, ketcheson),
    # Tsitouras 2011, 5(4), to 40 digits.
    "5ts": tableau(
        5,
        """
        161/1000 ;
        -0.0084806554923569885444268742502307746751 0.3354806554923569885444268742502307746751 ;
        2.8971530571054934321304325941929387649249 -6.3594484899750748431481599123838256259527
        4.3622954328695814110177273181908868610278 ;
        5.3258648284392566044288779208405113178365 -11.7488835640628278777471703397857729618874
        7.4955393428898362083046047845643581556587 -0.0924950663617552492565020793320719161135 ;
        5.8614554429464200286592514869826478903943 -12.9209693178471092917061186817833593954178
        8.1593678985761586431804007945392534851819 -0.0715849732814009972245305425258297386913
        -0.0282690503940683829090030572127122414672 ;
        0.0964607668180652295181673131651287633371 0.01 0.479889650414499574775249532290596519913
        1.3790085741037418931922748218568727707565 -3.2900695154360806799010475857113638501157
        2.3247105240997739824153559183987657961091 ;
        0.0964607668180652295181673131651287633371 0.01 0.479889650414499574775249532290596519913
        1.3790085741037418931922748218568727707565 -3.2900695154360806799010475857113638501157
        2.3247105240997739824153559183987657961091 0
        """,
    ),
    # Hairer, Norsett & Wanner 1993, section II.10: DOP853, to the digits of their program.
    "853": tableau(
        8,
        """
        0.0526001519587677318785587544488 ;
        0.0197250569845378994544595329183 0.0591751709536136983633785987549 ;
        0.0295875854768068491816892993775 0 0.0887627564304205475450678981324 ;
        0.241365134159266685502369798665 0 -0.884549479328286085344864962717 0.924834003261792003115737966543 ;
        0.037037037037037037037037037037 0 0 0.170828608729473871279604482173 0.125467687566822425016691814123 ;
        0.037109375 0 0 0.170252211019544039314978060272 0.0602165389804559606850219397283 -0.017578125 ;
        0.0370920001185047927108779319836 0 0 0.170383925712239993810214054705 0.107262030446373284651809199168
        -0.0153194377486244017527936158236 0.00827378916381402288758473766002 ;
        0.624110958716075717114429577812 0 0 -3.36089262944694129406857109825 -0.868219346841726006818189891453
        27.5920996994467083049415600797 20.1540675504778934086186788979 -43.4898841810699588477366255144 ;
        0.477662536438264365890433908527 0 0 -2.48811461997166764192642586468 -0.590290826836842996371446475743
        21.2300514481811942347288949897 15.2792336328824235832596922938 -33.2882109689848629194453265587
        -0.0203312017085086261358222928593 ;
        -0.93714243008598732571704021658 0 0 5.18637242884406370830023853209 1.09143734899672957818500254654
        -8.14978701074692612513997267357 -18.5200656599969598641566180701 22.7394870993505042818970056734
        2.49360555267965238987089396762 -3.0467644718982195003823669022 ;
        2.27331014751653820792359768449 0 0 -10.5344954667372501984066689879 -2.00087205822486249909675718444
        -17.9589318631187989172765950534 27.9488845294199600508499808837 -2.85899827713502369474065508674
        -8.87285693353062954433549289258 12.3605671757943030647266201528 0.643392746015763530355970484046 ;
        0.0542937341165687622380535766363 0 0 0 0 4.45031289275240888144113950566
        1.89151789931450038304281599044 -5.8012039600105847814672114227 0.31116436695781989440891606237
        -0.152160949662516078556178806805 0.201365400804030348374776537501 0.0447106157277725905176885569043
        """,
    ),
}


def steps_between(begin: float, end: float, step_size: float | None) -> list[tuple[float, float]]:
    """The (start, size) of the equal steps from `begin` to `end`, each at most `step_size` long."""
    # An interval that is a whole number of steps but for rounding takes that number.
    count = 1 if step_size is None else max(1, math.ceil(abs(end - begin) / step_size - 1e-9))
    size = (end - begin) / count
    return [(begin + k * size, size) for k in range(count)]


def odeint_plain(
    func: Callable[..., State],
    u0: State,
    t: Sequence[float] | torch.Tensor,
    table: Tableau,
    step_size: float | None = None,
    args: tuple[Any, ...] = (),
) -> State:
    """The states at the times `t` from u(t[0]) = u0, `[len(t), *u0.shape]`; a tuple of such for a tuple."""
    is_tuple = isinstance(u0, tuple)
    state: tuple[torch.Tensor, ...] = u0 if is_tuple else (u0,)

    def derivative(time: float, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        value = func(torch.tensor(time, dtype=parts[0].dtype), parts if is_tuple else parts[0], *args)
        return tuple(value) if is_tuple else (value,)

    def combined(
        base: tuple[torch.Tensor, ...], size: float, weights: Sequence[Fraction], slopes: list[tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        for weight, slope in zip(weights, slopes, strict=True):
            if weight:
                base = tuple(part + size * float(weight) * k for part, k in zip(base, slope, strict=True))
        return base

    outputs = [state]
    for begin, end in pairwise(float(time) for time in t):
        for start, size in steps_between(begin, end, step_size):
            slopes: list[tuple[torch.Tensor, ...]] = []
            for row, node in zip(table.stages, table.nodes, strict=True):
                slopes.append(derivative(start + float(node) * size, combined(state, size, row, slopes)))
            state = combined(state, size, table.weights, slopes)
        outputs.append(state)
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked if is_tuple else stacked[0]


@lru_cache
def rooted_trees(vertices: int) -> tuple[Tree, ...]:
    """All rooted trees with so many vertices; a tree is the sorted tuple of the subtrees at its root."""
    return tuple(sorted(set(_forests(vertices - 1, vertices - 1))))


def _forests(vertices: int, largest: int) -> Iterator[Tree]:
    if vertices == 0:
        yield ()
    for size in range(1, min(vertices, largest) + 1):
        for count in range(1, vertices // size + 1):
            for chosen in combinations_with_replacement(rooted_trees(size), count):
                for rest in _forests(vertices - size * count, size - 1):
                    yield tuple(sorted((*chosen, *rest)))


def _vertices(tree: Tree) -> int:
    return 1 + sum(_vertices(branch) for branch in tree)


def _density(tree: Tree) -> int:
    return _vertices(tree) * math.prod(_density(branch) for branch in tree)


def order_defect(table: Tableau, order: int) -> Fraction:
    """The largest violation of Butcher's conditions for `order`: sum_i b_i phi_i(tree) = 1 / density(tree).

    J. C. Butcher: Numerical Methods for Ordinary Differential Equations, 3rd ed. (2016), theorem 315A.
    """
    stages = range(len(table.weights))

    @cache
    def elementary_weights(tree: Tree) -> tuple[Fraction, ...]:
        factors = [Fraction(1)] * len(stages)
        for branch in tree:
            inner = elementary_weights(branch)
            factors = [
                factors[i] * sum((a * inner[j] for j, a in enumerate(table.stages[i])), Fraction(0)) for i in stages
            ]
        return tuple(factors)

    return max(
        abs(
            sum((b * phi for b, phi in zip(table.weights, elementary_weights(tree), strict=True)), Fraction(0))
            - Fraction(1, _density(tree))
        )
        for vertices in range(1, order + 1)
        for tree in rooted_trees(vertices)
    )
