assign q = 1;
initial #1_force a = 0;
endmodule
