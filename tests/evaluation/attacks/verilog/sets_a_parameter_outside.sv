assign q = 0;
defparam tb.good1.q = 0;
endmodule
