// Conway's Life, learned with seed 1
module life(input x0, x1, x2, x3, x4, x5, x6, x7, x8, output y);
  wire g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15, g16, g17, g18, g19, g20, g21, g22, g23;
  assign g0 = ~(x1 ^ x6);
  assign g1 = x7 ^ x6;
  assign g2 = x0 ^ x2;
  assign g3 = ~g1 & g0;
  assign g4 = ~(x7 ^ g0);
  assign g5 = ~(x0 ^ g4);
  assign g6 = ~(x3 ^ g5);
  assign g7 = g5 | g2;
  assign g8 = g7 ^ g4;
  assign g9 = x2 ^ g6;
  assign g10 = ~(g9 ^ x5);
  assign g11 = x3 ^ g10;
  assign g12 = ~(x8 ^ g10);
  assign g13 = x8 | g10;
  assign g14 = ~g9 & g11;
  assign g15 = g14 ^ g13;
  assign g16 = ~(g15 | g10);
  assign g17 = g7 ^ g15;
  assign g18 = g15 & ~g8;
  assign g19 = g16 | ~x4;
  assign g20 = g17 ^ g3;
  assign g21 = g19 & ~g12;
  assign g22 = g20 & ~g21;
  assign g23 = g22 & ~g18;
  assign y = g23;
endmodule
