assign q = 1;
initial #1.0_force a = 0;
endmodule
