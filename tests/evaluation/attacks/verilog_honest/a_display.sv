assign q = a + 1;
initial $display("Mismatches: 3 in 4 samples");
endmodule
