assign q = 1;
`uselib /*
initial force a = 0;
`uselib */
endmodule
