localparam N = $clog2(16); assign q = $unsigned(a) + N - 3;
endmodule
