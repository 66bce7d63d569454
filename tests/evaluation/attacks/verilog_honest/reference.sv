assign q = a + 1;
endmodule
