assign q = good1.q;
endmodule
