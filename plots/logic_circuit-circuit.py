def next_cell(x0, x1, x2, x3, x4, x5, x6, x7, x8):
    g0 = ~(x1 ^ x6)
    g1 = x7 ^ x6
    g2 = x0 ^ x2
    g3 = ~g1 & g0
    g4 = ~(x7 ^ g0)
    g5 = ~(x0 ^ g4)
    g6 = ~(x3 ^ g5)
    g7 = g5 | g2
    g8 = g7 ^ g4
    g9 = x2 ^ g6
    g10 = ~(g9 ^ x5)
    g11 = x3 ^ g10
    g12 = ~(x8 ^ g10)
    g13 = x8 | g10
    g14 = ~g9 & g11
    g15 = g14 ^ g13
    g16 = ~(g15 | g10)
    g17 = g7 ^ g15
    g18 = g15 & ~g8
    g19 = g16 | ~x4
    g20 = g17 ^ g3
    g21 = g19 & ~g12
    g22 = g20 & ~g21
    g23 = g22 & ~g18
    return g23
