integer i;
initial i = $random;
assign q = a + 1;
endmodule
