"""The tableaux of PETSc's TSARKIMEX, written down from its source, which names the papers they come from."""

from __future__ import annotations

from math import sqrt

from tests.oracles.implicit_tableaux import additive

# 1 - 1 / sqrt(2), the diagonal of the L-stable two-stage methods of order 2.
_GAMMA = 1 - 1 / sqrt(2)
# The implicit part of 2c, 2d and 2e, and the weights of the method that estimates their error.
_TR_BDF2 = ((0.0,), (_GAMMA, _GAMMA), (1 / (2 * sqrt(2)), 1 / (2 * sqrt(2)), _GAMMA))
_TR_BDF2_EMBEDDED = ((4 - sqrt(2)) / 8, (4 - sqrt(2)) / 8, 1 / (2 * sqrt(2)))

# Keys are PETSc's names.
ARKIMEX = {
    # Two half steps of backward Euler; one whole step, its first stage, estimates the error. PETSc registers it as of
    # order 2, the order that extrapolation of the two would have; the result that it keeps has order 1.
    "1bee": additive(1, "1 ; 0 1/2 ; 0 1/2 1/2", "0 ; 0 1/2", weights="0 1/2 1/2", embedded="1 0 0", embedded_order=1),
    # U. M. Ascher, S. J. Ruuth, R. J. Spiteri: Implicit-explicit Runge-Kutta methods for time-dependent partial
    # differential equations, Appl. Numer. Math. 25 (1997), 151-167: (1,2,2), the midpoint rules.
    "ars122": additive(2, "0 ; 0 1/2", "1/2", weights="0 1", embedded="1/2 1/2", embedded_order=1),
    # E. Constantinescu: the trapezoidal rules.
    "a2": additive(2, "0 ; 1/2 1/2", "1", weights="1/2 1/2", embedded="0 1", embedded_order=1),
    # L. Pareschi, G. Russo: Implicit-explicit Runge-Kutta schemes and applications to hyperbolic systems with
    # relaxation, J. Sci. Comput. 25 (2005), 129-155: SSP2(2,2,2).
    "l2": additive(2, ((_GAMMA,), (1 - 2 * _GAMMA, _GAMMA)), "1", weights="1/2 1/2", embedded="0 1", embedded_order=1),
    # E. Constantinescu: 2c, of large explicit stability on the negative axis; 2d, its stability in the limit of
    # infinite stiffness independent of the explicit part; 2e, an optimal one.
    "2c": additive(2, _TR_BDF2, ((2 - sqrt(2),), (0.5, 0.5)), embedded=_TR_BDF2_EMBEDDED, embedded_order=1),
    "2d": additive(2, _TR_BDF2, ((2 - sqrt(2),), (0.75, 0.25)), embedded=_TR_BDF2_EMBEDDED, embedded_order=1),
    "2e": additive(
        2,
        _TR_BDF2,
        ((2 - sqrt(2),), ((3 - 2 * sqrt(2)) / 6, (3 + 2 * sqrt(2)) / 6)),
        embedded=_TR_BDF2_EMBEDDED,
        embedded_order=1,
    ),
    # Pareschi & Russo 2005, SSP2(3,3,2).
    "prssp2": additive(2, "1/4 ; 0 1/4 ; 1/3 1/3 1/3", "1/2 ; 1/2 1/2"),
    # C. A. Kennedy, M. H. Carpenter: Additive Runge-Kutta schemes for convection-diffusion-reaction equations, Appl.
    # Numer. Math. 44 (2003), 139-181: ARK3(2)4L[2]SA.
    "3": additive(
        3,
        """
        0 ;
        1767732205903/4055673282236 1767732205903/4055673282236 ;
        2746238789719/10658868560708 -640167445237/6845629431997 1767732205903/4055673282236 ;
        1471266399579/7840856788654 -4482444167858/7529755066697 11266239266428/11593286722821
        1767732205903/4055673282236
        """,
        """
        1767732205903/2027836641118 ;
        5535828885825/10492691773637 788022342437/10882634858940 ;
        6485989280629/16251701735622 -4246266847089/9704473918619 10755448449292/10357097424841
        """,
        embedded="""
        2756255671327/12835298489170 -10771552573575/22201958757719 9247589265047/10645013368117
        2193209047091/5459859503100
        """,
        embedded_order=2,
    ),
    # S. Boscarino, L. Pareschi, G. Russo: Implicit-explicit Runge-Kutta schemes for hyperbolic systems and kinetic
    # equations in the diffusion limit, arXiv 1110.4375: ARK3. PETSc has 3/5 where the conditions of order 2 and 3 want
    # 3/4, in the last explicit stage: for split problems its order is 1, for purely implicit ones 3.
    "bpr3": additive(
        1,
        """
        0 ;
        0.5 0.5 ;
        5/18 -1/9 0.5 ;
        0.5 0 0 0.5 ;
        0.25 0 0.75 -0.5 0.5
        """,
        """
        1 ;
        4/9 2/9 ;
        1/4 0 3/4 ;
        1/4 0 3/5 0
        """,
    ),
    # Ascher, Ruuth & Spiteri 1997: (4,4,3).
    "ars443": additive(
        3,
        """
        0 ;
        0 1/2 ;
        0 1/6 1/2 ;
        0 -1/2 1/2 1/2 ;
        0 3/2 -3/2 1/2 1/2
        """,
        """
        1/2 ;
        11/18 1/18 ;
        5/6 -5/6 0.5 ;
        1/4 7/4 3/4 -7/4
        """,
    ),
    # Kennedy & Carpenter 2003: ARK4(3)6L[2]SA.
    "4": additive(
        4,
        """
        0 ;
        1/4 1/4 ;
        8611/62500 -1743/31250 1/4 ;
        5012029/34652500 -654441/2922500 174375/388108 1/4 ;
        15267082809/155376265600 -71443401/120774400 730878875/902184768 2285395/8070912 1/4 ;
        82889/524892 0 15625/83664 69875/102672 -2260/8211 1/4
        """,
        """
        1/2 ;
        13861/62500 6889/62500 ;
        -116923316275/2393684061468 -2731218467317/15368042101831 9408046702089/11113171139209 ;
        -451086348788/2902428689909 -2682348792572/7519795681897 12662868775082/11960479115383
        3355817975965/11060851509271 ;
        647845179188/3216320057751 73281519250/8382639484533 552539513391/3454668386233 3354512671639/8306763924573
        4040/17871
        """,
        embedded="""
        4586570599/29645900160 0 178811875/945068544 814220225/1159782912 -3700637/11593932 61727/225920
        """,
        embedded_order=3,
    ),
    # Kennedy & Carpenter 2003: ARK5(4)8L[2]SA.
    "5": additive(
        5,
        """
        0 ;
        41/200 41/200 ;
        41/400 -567603406766/11931857230679 41/200 ;
        683785636431/9252920307686 0 -110385047103/1367015193373 41/200 ;
        3016520224154/10081342136671 0 30586259806659/12414158314087 -22760509404356/11113319521817 41/200 ;
        218866479029/1489978393911 0 638256894668/5436446318841 -1179710474555/5321154724896 -60928119172/8023461067671
        41/200 ;
        1020004230633/5715676835656 0 25762820946817/25263940353407 -2161375909145/9755907335909
        -211217309593/5846859502534 -4269925059573/7827059040749 41/200 ;
        -872700587467/9133579230613 0 0 22348218063261/9555858737531 -1143369518992/8141816002931
        -39379526789629/19018526304540 32727382324388/42900044865799 41/200
        """,
        """
        41/100 ;
        367902744464/2072280473677 677623207551/8224143866563 ;
        1268023523408/10340822734521 0 1029933939417/13636558850479 ;
        14463281900351/6315353703477 0 66114435211212/5879490589093 -54053170152839/4284798021562 ;
        14090043504691/34967701212078 0 15191511035443/11219624916014 -18461159152457/12425892160975
        -281667163811/9011619295870 ;
        19230459214898/13134317526959 0 21275331358303/2942455364971 -38145345988419/4862620318723 -1/8 -1/8 ;
        -19977161125411/11928030595625 0 -40795976796054/6384907823539 177454434618887/12078138498510
        782672205425/8267701900261 -69563011059811/9646580694205 7356628210526/4942186776405
        """,
        embedded="""
        -975461918565/9796059967033 0 0 78070527104295/32432590147079 -548382580838/3424219808633
        -33438840321285/15594753105479 3629800801594/4656183773603 4035322873751/18575991585200
        """,
        embedded_order=4,
    ),
}
