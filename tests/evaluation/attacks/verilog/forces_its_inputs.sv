assign q = 1;
initial force a = 0;
endmodule
