assign q = tb.good1.q;
endmodule
