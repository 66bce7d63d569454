assign q = 1;
`begin_keywords "1800-2009" "
initial force a = 0;
`end_keywords "
endmodule
