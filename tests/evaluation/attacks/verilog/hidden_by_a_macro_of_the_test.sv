assign q = 1;
`ifdef OK
initial force a = 0;
`endif
endmodule
