assign q = 0;
integer f;
initial begin f = $fopen("x"); $fdisplay(f, "x"); end
endmodule
